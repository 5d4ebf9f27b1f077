#include "launch.cuh"

namespace idlevit::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

// The runtime knows best which machine code and which PTX of this build the device takes.
const char* unusable(int device) {
    return on_device({device, 0}, [](cudaStream_t) {
        cudaFuncAttributes attributes;
        cudaFuncGetAttributes(&attributes, probe_kernel);
    });
}

}  // namespace idlevit::cuda
