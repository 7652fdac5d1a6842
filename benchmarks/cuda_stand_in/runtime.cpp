// A CUDA runtime that allocates and counts, and computes nothing: it stands in front of NVIDIA's on a machine without a
// GPU (LD_PRELOAD), so that torch's own CUDA build runs its host code as it would. Device memory is address space that
// nobody touches; what is read back from it is zero. `count.py` adds an empty function for every other symbol.

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#undef cudaStreamGetCaptureInfo

namespace {

constexpr size_t kDeviceBytes = size_t{141} << 30;
constexpr size_t kPage = size_t{2} << 20;
constexpr int kSharedBytes = 49152;

std::recursive_mutex mutex;
std::atomic<long> launches, products, synchronizations, next_handle{1 << 20};
size_t allocated;

// Never destroyed: libraries give memory back when the process ends.
std::map<char*, size_t>& blocks() {
    static auto* found = new std::map<char*, size_t>;
    return *found;
}

bool on_device(const void* address) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    auto after = blocks().upper_bound((char*)address);
    if (after == blocks().begin()) return false;
    --after;
    return (char*)address < after->first + after->second;
}

void copy(void* to, const void* from, size_t size) {
    if (on_device(to)) return;
    if (on_device(from)) memset(to, 0, size);
    else memcpy(to, from, size);
}

template <class Handle>
cudaError_t new_handle(Handle* handle) {
    *handle = (Handle)(next_handle += 16);
    return cudaSuccess;
}

template <class Handle>
cublasStatus_t new_object(Handle* handle) {
    *handle = (Handle)calloc(1, 64);
    return CUBLAS_STATUS_SUCCESS;
}

cudaError_t launched() {
    ++launches;
    return cudaSuccess;
}

cublasStatus_t multiplied() {
    ++launches, ++products;
    return CUBLAS_STATUS_SUCCESS;
}

cudaError_t waited() {
    ++synchronizations;
    return cudaSuccess;
}

}  // namespace

extern "C" {

void stand_in_counts(long* found) {
    found[0] = launches, found[1] = products, found[2] = synchronizations;
}

// The device: what torch asks of one before it chooses kernels, as of an H200.
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorMemoryAllocation"; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    static const std::map<int, int> known = {
        {cudaDevAttrComputeCapabilityMajor, 9},      {cudaDevAttrComputeCapabilityMinor, 0},
        {cudaDevAttrMultiProcessorCount, 132},       {cudaDevAttrMaxSharedMemoryPerBlock, kSharedBytes},
        {cudaDevAttrMaxThreadsPerBlock, 1024},       {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
        {cudaDevAttrWarpSize, 32},                   {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
        {cudaDevAttrMaxGridDimX, 2147483647},        {cudaDevAttrMaxGridDimY, 65535},
        {cudaDevAttrMaxGridDimZ, 65535},             {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
    };
    auto found = known.find(attribute);
    return *value = found == known.end() ? 1 : found->second, cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "stand-in, computes nothing");
    found->totalGlobalMem = kDeviceBytes;
    found->major = 9;
    found->multiProcessorCount = 132;
    found->warpSize = 32;
    found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    found->maxThreadsPerMultiProcessor = 2048;
    found->maxGridSize[0] = 2147483647;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->sharedMemPerBlock = kSharedBytes;
    found->sharedMemPerBlockOptin = 232448;
    found->sharedMemPerMultiprocessor = 233472;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->l2CacheSize = 60 << 20;
    found->textureAlignment = 512;
    found->unifiedAddressing = found->managedMemory = found->concurrentManagedAccess = 1;
    return cudaSuccess;
}

// Memory.
cudaError_t cudaMalloc(void** address, size_t size) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    size = (size + kPage - 1) / kPage * kPage;
    *address = nullptr;
    if (allocated + size > kDeviceBytes) return cudaErrorMemoryAllocation;
    void* found = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return cudaErrorMemoryAllocation;
    blocks()[(char*)found] = size;
    allocated += size;
    return *address = found, cudaSuccess;
}

cudaError_t cudaMallocManaged(void** address, size_t size, unsigned) { return cudaMalloc(address, size); }

cudaError_t cudaFree(void* address) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    auto found = blocks().find((char*)address);
    if (found == blocks().end()) return cudaSuccess;
    munmap(address, found->second);
    allocated -= found->second;
    blocks().erase(found);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    return *free = kDeviceBytes - allocated, *total = kDeviceBytes, cudaSuccess;
}

cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
    return posix_memalign(address, 4096, size ? size : 1) ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFreeHost(void* address) { return free(address), cudaSuccess; }

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
    memset(found, 0, sizeof *found);
    found->type = on_device(address) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
    copy(to, from, size);
    return launched();
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    copy(to, from, size);
    return launched(), waited();
}

cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return launched(); }
cudaError_t cudaMemset(void*, int, size_t) { return launched(); }

// Streams and events.
cudaError_t cudaStreamSynchronize(cudaStream_t) { return waited(); }
cudaError_t cudaDeviceSynchronize() { return waited(); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return waited(); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    return *milliseconds = 1, cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return new_handle(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return new_handle(stream); }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return new_handle(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return new_handle(event); }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**,
    const cudaGraphEdgeData**, size_t*) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

// Kernels.
void** __cudaRegisterFatBinary(void*) {
    static void* handle[1];
    return handle;
}
char __cudaInitModule(void**) { return 1; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    return *kernel = (cudaKernel_t)function, cudaSuccess;
}
static thread_local struct {
    dim3 grid, block;
    size_t shared;
    void* stream;
} configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    return configuration = {grid, block, shared, stream}, 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
    return *(void**)stream = configuration.stream, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return launched(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return launched(); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { return launched(); }
cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return launched(); }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->ptxVersion = found->binaryVersion = 90;
    found->maxDynamicSharedSizeBytes = kSharedBytes;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
    return *blocks = 2, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
    return *blocks = 2, cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** address, const void*) {
    static char symbols[1 << 16];
    return *address = symbols, cudaSuccess;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    return *flags = 0, *active = 1, CUDA_SUCCESS;
}

// Products.
cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) { return new_object(handle); }
cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
    return *mode = CUBLAS_DEFAULT_MATH, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
    return *mode = CUBLAS_POINTER_MODE_HOST, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmEx(
    cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void*, const void*, cudaDataType, int,
    const void*, cudaDataType, int, const void*, void*, cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t) {
    return multiplied();
}
cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void*, const void*, cudaDataType, int,
    long long, const void*, cudaDataType, int, long long, const void*, void*, cudaDataType, int, long long, int,
    cublasComputeType_t, cublasGemmAlgo_t) {
    return multiplied();
}
cublasStatus_t cublasSgemm_v2(
    cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const float*, const float*, int, const float*,
    int, const float*, float*, int) {
    return multiplied();
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* object, cublasComputeType_t, cudaDataType_t) {
    return new_object(object);
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* object, cudaDataType, uint64_t, uint64_t, int64_t) {
    return new_object(object);
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* object) { return new_object(object); }
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t* result, int* count) {
    memset(result, 0, sizeof *result);
    return *count = 1, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void*, cublasLtMatrixLayout_t, const void*,
    cublasLtMatrixLayout_t, const void*, const void*, cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t,
    const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t) {
    return multiplied();
}

}  // extern "C"
