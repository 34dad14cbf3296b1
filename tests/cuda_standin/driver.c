// libcuda.so.1 without a driver: what torch and Triton ask of it. Modules load, launches do nothing.
#include <cuda.h>

#include "device.h"

#define CALL EXPORT CUresult
#define DONE \
    { return CUDA_SUCCESS; }

CALL cuInit(unsigned flags) DONE
CALL cuDriverGetVersion(int *version) { *version = VERSION; return CUDA_SUCCESS; }
CALL cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return CUDA_SUCCESS; }
CALL cuDeviceGetCount(int *n) { *n = 1; return CUDA_SUCCESS; }
CALL cuDeviceGetAttribute(int *value, CUdevice_attribute name, CUdevice device) {
    switch (name) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = MAJOR; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = MINOR; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = MULTIPROCESSORS; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_PER_BLOCK_OPTIN; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED_PER_MULTIPROCESSOR; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = CLOCK_KHZ; break;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = MEMORY_CLOCK_KHZ; break;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = MEMORY_BUS_BITS; break;
        default: *value = 1;
    }
    return CUDA_SUCCESS;
}
CALL cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)16; return CUDA_SUCCESS; }
CALL cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
CALL cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)16; return CUDA_SUCCESS; }
CALL cuCtxSetCurrent(CUcontext context) DONE
CALL cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; return CUDA_SUCCESS; }
CALL cuCtxSetLimit(CUlimit limit, size_t value) DONE
CALL cuGetErrorString(CUresult result, const char **text) { *text = "no error"; return CUDA_SUCCESS; }
CALL cuModuleLoad(CUmodule *module, const char *path) { *module = (CUmodule)32; return CUDA_SUCCESS; }
CALL cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)32; return CUDA_SUCCESS; }
CALL cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}
CALL cuModuleUnload(CUmodule module) DONE
CALL cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)48;
    return CUDA_SUCCESS;
}
CALL cuFuncGetAttribute(int *value, CUfunction_attribute name, CUfunction function) {
    *value = name == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : name == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
    return CUDA_SUCCESS;
}
CALL cuFuncSetAttribute(CUfunction function, CUfunction_attribute name, int value) DONE
CALL cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) DONE
CALL cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                    unsigned shared, CUstream stream, void **arguments, void **extra) DONE
CALL cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) DONE
CALL cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                               unsigned bz, unsigned shared, CUstream stream, void **arguments) DONE
CALL cuLinkCreate_v2(unsigned n, CUjit_option *options, void **values, CUlinkState *state) DONE
CALL cuLinkAddData_v2(CUlinkState state, CUjitInputType type, void *data, size_t size, const char *name, unsigned n,
                      CUjit_option *options, void **values) DONE
CALL cuLinkComplete(CUlinkState state, void **image, size_t *size) DONE
CALL cuOccupancyMaxActiveClusters(int *n, CUfunction function, const CUlaunchConfig *config) {
    *n = 8;
    return CUDA_SUCCESS;
}
CALL cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction function, int threads, size_t shared) {
    *n = 8;
    return CUDA_SUCCESS;
}
CALL cuPointerGetAttribute(void *value, CUpointer_attribute name, CUdeviceptr pointer) {
    *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}
CALL cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                            const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                            const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                            CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) DONE
