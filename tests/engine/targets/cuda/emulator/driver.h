// Behind a kernel's source: how the runtime calls it. The only variables of a kernel's library are those in shared memory: the linker
// says where they lie. (A section of their own would miss those of templates, where g++ forgets the attribute.)
extern "C" __attribute__((visibility("hidden"))) unsigned char __bss_start[], _end[];
extern "C" int emulate(void (*)(const void*), const void*, const unsigned*, unsigned char*, unsigned char*, char*);
extern "C" __attribute__((visibility("default"))) int emulate_kernel(const void* params, const unsigned* sizes, char* message) {
  const auto run = [](const void* p) { kernel(*static_cast<const Params*>(p)); };
  return emulate(run, params, sizes, __bss_start, _end, message);
}
