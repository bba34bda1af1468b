// Behind a kernel's source: runs it over a grid. See device.h.
namespace emulator {
inline const Params* parameters;
void run_thread() { kernel(*parameters); }
}  // namespace emulator

extern "C" int emulate(const void* params, const unsigned* sizes, char* message) {
  using namespace emulator;
  parameters = static_cast<const Params*>(params);
  emulator::message = message;
  grid = {sizes[0], sizes[1], sizes[2]};
  threads = static_cast<int>(sizes[3]);
  block_size = {sizes[3], 1, 1};
  last_first = sizes[4] != 0;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block = {x, y, z};
        if (!run_block()) return 1;
      }
  return 0;
}
