/* A CUDA runtime, and the part of cuBLAS that torch calls, that computes nothing.
 *
 * Preloaded into a process, it takes the place of libcudart and libcublas. torch's dispatcher, caching allocator, streams,
 * events, autograd threads and graph captures then run as on a GPU, and every launch, copy, synchronisation and replay is
 * written to a log with its device, stream and capture. Nothing is written to device memory; it reads as zeros. Two H100s
 * are there. Captures follow CUDA's rules as far as torch can break them: to wait for a capturing stream fails and
 * makes the capture invalid.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#undef cudaGetDeviceProperties
#undef cudaStreamGetCaptureInfo

enum { DEVICES = 2, MAX_STREAMS = 4096, MAX_CAPTURES = 1 << 16, NAMES = 1 << 21 };

typedef struct {
    int device, number, is_origin, is_invalid;
    unsigned long long capture; /* 0: none */
} Stream;

typedef struct {
    int is_recorded;
    unsigned long long capture;
} Event;

typedef struct {
    int nodes;
} Graph;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int device;
static Stream default_streams[DEVICES], *streams[MAX_STREAMS];
static int stream_count;
static unsigned long long captures;
static int nodes_of[MAX_CAPTURES];
static FILE *log_file;

static Stream *stream_of(cudaStream_t stream) {
    if ((uintptr_t)stream > 2) return (Stream *)stream; /* 0, 1 and 2 are the default streams */
    default_streams[device].device = device;
    return &default_streams[device];
}

static void record(const char *kind, const char *name, Stream *stream) {
    pthread_mutex_lock(&lock);
    if (stream->capture) nodes_of[stream->capture % MAX_CAPTURES]++;
    if (log_file)
        fprintf(log_file, "%s\t%d\t%d\t%llu\t%s\n", kind, stream->device, stream->number, stream->capture, name);
    pthread_mutex_unlock(&lock);
}

/* What the tests call: the log has tab-separated lines of kind, device, stream, capture and name. */
void fake_log(const char *path) {
    if (log_file) fclose(log_file);
    log_file = path ? fopen(path, "w") : NULL;
}

void fake_note(const char *text) {
    if (log_file) fprintf(log_file, "note\t-\t-\t-\t%s\n", text);
}

void fake_launch(const char *name, uintptr_t stream) { record("kernel", name, stream_of((cudaStream_t)stream)); }

/* Kernels have the names that they are registered by, in a hash table by address. */
static struct {
    const void *key;
    const char *name;
} names[NAMES];

static size_t slot_of(const void *key) {
    size_t slot = ((uintptr_t)key >> 2) * 0x9E3779B97F4A7C15ull >> 43;
    while (names[slot].key && names[slot].key != key) slot = (slot + 1) % NAMES;
    return slot;
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[2];
    return handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **h, char *v, char *a, const char *n, int e, size_t s, int c, int g) {}
void __cudaRegisterFunction(void **h, const char *host, char *d, const char *name, int t, void *a, void *b, void *c,
                            void *e, int *w) {
    size_t slot = slot_of(host);
    names[slot].key = host, names[slot].name = name;
}

static const char *name_of(const void *kernel) {
    const char *name = names[slot_of(kernel)].name;
    return name ? name : "?";
}

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configurations[64];
static __thread int depth;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configurations[depth].grid = grid, configurations[depth].block = block;
    configurations[depth].shared = shared, configurations[depth++].stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configurations[--depth].grid, *block = configurations[depth].block;
    *shared = configurations[depth].shared, *(void **)stream = configurations[depth].stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    record("kernel", name_of((void *)kernel), stream_of(stream));
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    return __cudaLaunchKernel((cudaKernel_t)kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *kernel, void **arguments) {
    record("kernel", name_of(kernel), stream_of(configuration->stream));
    return cudaSuccess;
}

/* Devices. */
cudaError_t cudaGetDeviceCount(int *count) {
    *count = DEVICES;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *current) {
    *current = device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) {
    if (number < 0 || number >= DEVICES) return cudaErrorInvalidDevice;
    device = number;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int number) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "an H100 that computes nothing");
    p->major = 9, p->minor = 0, p->multiProcessorCount = 132, p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsPerMultiProcessor = 2048, p->maxThreadsPerBlock = 1024, p->warpSize = 32;
    p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->l2CacheSize = 50 << 20, p->totalGlobalMem = 80ull << 30;
    p->maxGridSize[0] = INT32_MAX, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->unifiedAddressing = 1, p->textureAlignment = 512;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int number) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrMultiProcessorCount: *value = 132; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxGridDimX: *value = INT32_MAX; break;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        default: *value = 0;
    }
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceCanAccessPeer(int *can, int from, int to) {
    *can = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int number) {
    strncpy(id, "0000:00:00.0", length);
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->numRegs = 32, attributes->maxThreadsPerBlock = 1024;
    attributes->binaryVersion = attributes->ptxVersion = 90, attributes->maxDynamicSharedSizeBytes = 49152;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size,
                                                                   size_t shared, unsigned flags) {
    *blocks = 8;
    return cudaSuccess;
}
static long nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    *function = (void *)nothing;
    if (result) *result = 0;
    return cudaSuccess;
}

/* Errors. */
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t error) {
    static __thread char text[64];
    sprintf(text, "fake CUDA error %d", (int)error);
    return text;
}
const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

/* Memory. */
cudaError_t cudaMalloc(void **pointer, size_t size) {
    char *memory = mmap(NULL, size + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return cudaErrorMemoryAllocation;
    *pointer = memory; /* never given back: addresses stay apart, and untouched pages cost nothing */
    return cudaSuccess;
}
cudaError_t cudaFree(void *pointer) { return cudaSuccess; }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    *pointer = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void *pointer) { return cudaSuccess; }
cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void *pointer) { return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *available = 78ull << 30, *total = 80ull << 30;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered;
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    static const char *kinds[] = {"host to host", "host to device", "device to host", "device to device", "default"};
    record("copy", kinds[kind], stream_of(stream));
    if (kind == cudaMemcpyDeviceToHost) memset(to, 0, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, size, kind, NULL);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size,
                                cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemsetAsync(void *pointer, int value, size_t size, cudaStream_t stream) {
    record("fill", "memset", stream_of(stream));
    return cudaSuccess;
}
cudaError_t cudaMemset(void *pointer, int value, size_t size) { return cudaMemsetAsync(pointer, value, size, NULL); }
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset, enum cudaMemcpyKind k) {
    return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
    static char memory[1 << 16];
    *pointer = memory;
    return cudaSuccess;
}

/* Streams and events. */
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    Stream *made = calloc(1, sizeof *made);
    pthread_mutex_lock(&lock);
    made->device = device, made->number = ++stream_count, streams[stream_count] = made;
    pthread_mutex_unlock(&lock);
    *stream = (cudaStream_t)made;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0, *greatest = -5;
    return cudaSuccess;
}
static cudaError_t forbidden(Stream *capturing) {
    capturing->is_invalid = 1;
    return cudaErrorStreamCaptureUnsupported;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return stream_of(stream)->capture ? forbidden(stream_of(stream)) : cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    record("wait", "stream", stream_of(stream));
    return stream_of(stream)->capture ? forbidden(stream_of(stream)) : cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
    record("wait", "device", stream_of(NULL));
    for (int i = 1; i <= stream_count; i++)
        if (streams[i]->device == device && streams[i]->is_origin) return forbidden(streams[i]);
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = (cudaEvent_t)calloc(1, sizeof(Event));
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (stream_of(stream)->device != device) return cudaErrorInvalidResourceHandle;
    ((Event *)event)->is_recorded = 1, ((Event *)event)->capture = stream_of(stream)->capture;
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    return ((Event *)event)->capture ? cudaErrorCapturedEvent : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaEventQuery(event); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = 1;
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    Stream *waiting = stream_of(stream);
    unsigned long long capture = ((Event *)event)->capture;
    if (!((Event *)event)->is_recorded || capture == waiting->capture) return cudaSuccess;
    if (!capture) {
        forbidden(waiting);
        return cudaErrorStreamCaptureIsolation;
    }
    if (waiting->capture) return cudaErrorStreamCaptureMerge;
    waiting->capture = capture; /* joins the capture */
    return cudaSuccess;
}

/* Captures and graphs. */
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    Stream *origin = stream_of(stream);
    if (origin->capture) return cudaErrorIllegalState;
    origin->capture = ++captures, origin->is_origin = 1, origin->is_invalid = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    Stream *origin = stream_of(stream);
    unsigned long long capture = origin->capture;
    Graph *made = calloc(1, sizeof *made);
    made->nodes = nodes_of[capture % MAX_CAPTURES];
    for (int i = 1; i <= stream_count; i++)
        if (streams[i]->capture == capture) streams[i]->capture = 0;
    origin->is_origin = 0;
    *graph = origin->is_invalid ? NULL : (cudaGraph_t)made;
    return origin->is_invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}
static enum cudaStreamCaptureStatus status_of(Stream *stream) {
    if (!stream->capture) return cudaStreamCaptureStatusNone;
    return stream->is_invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = status_of(stream_of(stream));
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    *status = status_of(stream_of(stream));
    if (id) *id = stream_of(stream)->capture;
    if (graph) *graph = NULL;
    if (count) *count = 0;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    static __thread enum cudaStreamCaptureMode current;
    enum cudaStreamCaptureMode before = current;
    current = *mode, *mode = before;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    *executable = (cudaGraphExec_t)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(executable, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    char nodes[32];
    sprintf(nodes, "%d", ((Graph *)executable)->nodes);
    record("replay", nodes, stream_of(stream));
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = ((Graph *)graph)->nodes;
    return cudaSuccess;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *dependencies, cudaGraphEdgeData *edges,
                                         size_t *count) {
    *count = 0;
    return cudaSuccess;
}

/* cuBLAS: a handle is where its stream is kept. */
#define SUCCEEDS(function) \
    int function(void) { return 0; }
#define PRODUCT(function)                                        \
    int function(void **handle) {                                \
        record("kernel", #function, stream_of((cudaStream_t)*handle)); \
        return 0;                                                \
    }
#define MAKES(function)                \
    int function(void **description) { \
        *description = malloc(256);    \
        return 0;                      \
    }
int cublasCreate_v2(void **handle) {
    *handle = calloc(1, sizeof(void *));
    return 0;
}
int cublasSetStream_v2(void **handle, void *stream) {
    *handle = stream;
    return 0;
}
int cublasGetMathMode(void *handle, int *mode) {
    *mode = 0;
    return 0;
}
int cublasGetPointerMode_v2(void *handle, int *mode) {
    *mode = 0;
    return 0;
}
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetWorkspace_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemv_v2)
MAKES(cublasLtMatmulDescCreate)
MAKES(cublasLtMatmulPreferenceCreate)
MAKES(cublasLtMatrixLayoutCreate)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
    memset(results, 0, 64);
    *found = 1;
    return 0;
}
int cublasLtMatmul(void *handle, void *product, const void *alpha, const void *a, void *a_layout, const void *b,
                   void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
                   const void *algorithm, void *workspace, size_t size, cudaStream_t stream) {
    record("kernel", "cublasLtMatmul", stream_of(stream));
    return 0;
}
