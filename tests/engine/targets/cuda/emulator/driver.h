// Behind a kernel's source: how the runtime calls it.
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_emulated_shared[], __stop_emulated_shared[];
extern "C" int emulate(void (*)(const void*), const void*, const unsigned*, unsigned char*, unsigned char*, char*);
extern "C" __attribute__((visibility("default"))) int emulate_kernel(const void* params, const unsigned* sizes, char* message) {
  const auto run = [](const void* p) { kernel(*static_cast<const Params*>(p)); };
  return emulate(run, params, sizes, __start_emulated_shared, __stop_emulated_shared, message);
}
