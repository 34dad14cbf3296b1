// The CUDA runtime's calls that torch makes, without a GPU. Preloaded, they come before libcudart's own.
//
// Device memory is the host's. Kernels do nothing: operators.py computes what torch's operators would have. Streams and
// events are numbers, whose work is always done. A thread that captures a graph is told so, so that torch's own checks
// of what may not be captured hold.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

#define CALL EXPORT cudaError_t
#define DONE \
    { return cudaSuccess; }
#define GIVE(out, value) \
    { *(out) = (value); return cudaSuccess; }

static long next_handle = 16;
static void *handle(void) { return (void *)__atomic_add_fetch(&next_handle, 16, __ATOMIC_RELAXED); }

// The device
CALL cudaGetDeviceCount(int *n) GIVE(n, 1)
CALL cudaGetDevice(int *device) GIVE(device, 0)
CALL cudaSetDevice(int device) DONE
CALL cudaDeviceSynchronize(void) DONE
CALL cudaDriverGetVersion(int *version) GIVE(version, VERSION)
CALL cudaRuntimeGetVersion(int *version) GIVE(version, VERSION)
CALL cudaGetLastError(void) DONE
CALL cudaPeekAtLastError(void) DONE
CALL cudaDeviceCanAccessPeer(int *can, int device, int peer) GIVE(can, 0)
CALL cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
CALL cudaDeviceGetPCIBusId(char *id, int size, int device) { snprintf(id, size, "0000:01:00.0"); return cudaSuccess; }
CALL cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "stand-in for an H100");
    p->totalGlobalMem = (size_t)80 << 30;
    p->major = MAJOR;
    p->minor = MINOR;
    p->multiProcessorCount = MULTIPROCESSORS;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
    p->sharedMemPerBlock = SHARED_PER_BLOCK;
    p->sharedMemPerBlockOptin = SHARED_PER_BLOCK_OPTIN;
    p->sharedMemPerMultiprocessor = SHARED_PER_MULTIPROCESSOR;
    p->l2CacheSize = 50 << 20;
    p->memoryBusWidth = MEMORY_BUS_BITS;
    p->concurrentKernels = p->unifiedAddressing = 1;
    return cudaSuccess;
}
CALL cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr name, int device) {
    switch (name) {
        case cudaDevAttrComputeCapabilityMajor: *value = MAJOR; break;
        case cudaDevAttrComputeCapabilityMinor: *value = MINOR; break;
        case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_PER_BLOCK; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_PER_BLOCK_OPTIN; break;
        case cudaDevAttrClockRate: *value = CLOCK_KHZ; break;
        case cudaDevAttrMemoryClockRate: *value = MEMORY_CLOCK_KHZ; break;
        default: *value = 1;
    }
    return cudaSuccess;
}
CALL cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                      enum cudaDriverEntryPointQueryResult *found) {
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
    *function = driver ? dlsym(driver, name) : NULL;
    if (found) *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

// Memory
CALL cudaMalloc(void **p, size_t size) {
    return posix_memalign(p, 512, size ? size : 512) ? cudaErrorMemoryAllocation : cudaSuccess;
}
CALL cudaFree(void *p) { free(p); return cudaSuccess; }
CALL cudaHostAlloc(void **p, size_t size, unsigned flags) { return cudaMalloc(p, size); }
CALL cudaFreeHost(void *p) { free(p); return cudaSuccess; }
CALL cudaHostRegister(void *p, size_t size, unsigned flags) DONE
CALL cudaHostUnregister(void *p) DONE
CALL cudaMemGetInfo(size_t *available, size_t *total) {
    *available = (size_t)78 << 30;
    *total = (size_t)80 << 30;
    return cudaSuccess;
}
CALL cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) { memcpy(to, from, n); return cudaSuccess; }
CALL cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return cudaMemcpy(to, from, n, kind);
}
CALL cudaMemset(void *p, int value, size_t n) { memset(p, value, n); return cudaSuccess; }
CALL cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t stream) { return cudaMemset(p, value, n); }
CALL cudaGetSymbolAddress(void **p, const void *symbol) GIVE(p, calloc(1, 1 << 16))
CALL cudaMemcpyToSymbol(const void *symbol, const void *from, size_t n, size_t at, enum cudaMemcpyKind kind) DONE
CALL cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeDevice;
    a->devicePointer = (void *)p;
    return cudaSuccess;
}

// Streams and events
CALL cudaStreamCreate(cudaStream_t *stream) GIVE(stream, handle())
CALL cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) GIVE(stream, handle())
CALL cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) GIVE(stream, handle())
CALL cudaStreamDestroy(cudaStream_t stream) DONE
CALL cudaStreamGetPriority(cudaStream_t stream, int *priority) GIVE(priority, 0)
CALL cudaStreamQuery(cudaStream_t stream) DONE
CALL cudaStreamSynchronize(cudaStream_t stream) DONE
CALL cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) DONE
CALL cudaEventCreate(cudaEvent_t *event) GIVE(event, handle())
CALL cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) GIVE(event, handle())
CALL cudaEventDestroy(cudaEvent_t event) DONE
CALL cudaEventQuery(cudaEvent_t event) DONE
CALL cudaEventRecord(cudaEvent_t event, cudaStream_t stream) DONE
CALL cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) DONE
CALL cudaEventSynchronize(cudaEvent_t event) DONE
CALL cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) GIVE(ms, 1.0f)

// Kernels
CALL cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) DONE
CALL cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) DONE
CALL cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                 cudaStream_t stream) DONE
CALL __cudaLaunchKernel(void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) DONE
CALL __cudaGetKernel(void **kernel, const void *function) GIVE(kernel, (void *)function)
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) { return 0; }
CALL __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    grid->x = grid->y = grid->z = block->x = block->y = block->z = 1;
    *shared = 0;
    *(void **)stream = NULL;
    return cudaSuccess;
}
CALL cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    return cudaSuccess;
}
CALL cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute name, int value) DONE
CALL cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute name, int value, int device) DONE
CALL cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *jit, void **jit_values,
                         unsigned n_jit, enum cudaLibraryOption *options, void **values, unsigned n)
    GIVE(library, handle())
CALL cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) GIVE(kernel, handle())
CALL cudaLibraryUnload(cudaLibrary_t library) DONE
CALL cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *function, int threads, size_t shared) GIVE(n, 8)
CALL cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *function, int threads, size_t shared,
                                                            unsigned flags) GIVE(n, 8)

// Graphs
static __thread int capturing;
static unsigned long long n_captures;
CALL cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) DONE
CALL cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    capturing = 1;
    __atomic_add_fetch(&n_captures, 1, __ATOMIC_RELAXED);
    return cudaSuccess;
}
CALL cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) { capturing = 0; *graph = handle(); return cudaSuccess; }
CALL cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
    GIVE(status, capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone)
#undef cudaStreamGetCaptureInfo
CALL cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                              cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                              size_t *n) {
    cudaStreamIsCapturing(stream, status);
    if (id) *id = n_captures;
    if (graph) *graph = (cudaGraph_t)16;
    if (n) *n = 0;
    return cudaSuccess;
}
CALL cudaGraphInstantiateWithFlags(cudaGraphExec_t *run, cudaGraph_t graph, unsigned long long flags) GIVE(run, handle())
CALL cudaGraphLaunch(cudaGraphExec_t run, cudaStream_t stream) DONE
CALL cudaGraphDestroy(cudaGraph_t graph) DONE
CALL cudaGraphExecDestroy(cudaGraphExec_t run) DONE
CALL cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) GIVE(n, 1)
CALL cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) GIVE(pool, handle())
CALL cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr name, void *value) DONE
CALL cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr name, void *value) DONE
