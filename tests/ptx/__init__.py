"""An emulator of the PTX that Triton emits: the compiled kernels, executed on CPU tensors, without a GPU.

Triton compiles a kernel for NVIDIA's GPUs to PTX, which is then assembled. Here a driver of our own (`driver.py`) hands
each launch to `launch.py`, which runs the PTX on numpy arrays that hold a register of all threads at once. So all that
comes before the assembler is real: the specialisation, the code, the conversion of arguments.

- `parser.py` reads a kernel; `machine.py` runs threads through its blocks; `memory.py` is what they read and write.
- `scalar.py`, `transfers.py` and `hopper.py` are the instructions: of one thread; of memory and warps; and what came
  with compute capability 9.0 (barriers in memory, bulk copies, asynchronous products). `values.py` is their arithmetic.
- `device.py` puts the driver in place of Triton's, and tells it what the package's tables point to.

Registers hold unsigned integers, predicates bools. What a GPU would trap on, or leave undefined, raises `Fault`. An
instruction that is not written down here raises NotImplementedError: nothing is guessed.
"""
