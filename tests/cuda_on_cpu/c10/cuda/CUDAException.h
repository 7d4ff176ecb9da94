// Faults end the process at once: there is nothing left to check after a launch.
#pragma once

#define C10_CUDA_KERNEL_LAUNCH_CHECK()
