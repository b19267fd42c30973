#include "smi_fast_kernels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <initializer_list>
#include <iterator>
#include <mutex>
#include <string_view>
#include <type_traits>

namespace {

enum class Operation {
    attention_forward,
    attention_backward,
    attention_backward_dkv,
    class_attention_forward,
    class_attention_backward,
    select,
    count_mass,
    select_backward,
    gather_patches,
    gather_patches_backward,
};

enum class Kernel {
    tile_forward,
    blocks_forward,
    tile_backward,
    rows_backward,
    blocks_dq,
    blocks_dkv,
    class_forward,
    class_backward,
    select,
    count,
    select_backward,
    gather,
    gather_backward,
};

// A letter for each parameter of a kernel: pointer, int32_t, float or double. table.inc asserts that they are right.
constexpr std::string_view parameters(Kernel kernel) {
    switch (kernel) {
        case Kernel::tile_forward:
        case Kernel::blocks_forward: return "ppppppfii";
        case Kernel::tile_backward: return "ppppffi";
        case Kernel::rows_backward: return "pppppppffii";
        case Kernel::blocks_dq: return "ppppppppffii";
        case Kernel::blocks_dkv: return "pppppppffii";
        case Kernel::class_forward: return "ppppppfii";
        case Kernel::class_backward: return "pppppppffi";
        case Kernel::select: return "ppppppppppiiiiiii";
        case Kernel::count: return "ppppiidi";
        case Kernel::select_backward: return "pppiii";
        case Kernel::gather: return "pppppppi";
        case Kernel::gather_backward: return "ppppi";
    }
    return "";
}

struct Cubin {
    Kernel kernel;
    const char *name;
    int threads;
    int shared_bytes;
    const char *code;
};

struct Row {
    int arch;
    Operation operation;
    int key[6];
    int up_to;
    int block[2];
    int cubin;
};

#include "table.inc"

constexpr int SHARED_BYTES_WITHOUT_ASKING = 48 * 1024;
constexpr int FIRST_ARCH_WITHOUT_SUCCESSORS = 90;  // from here on a cubin of Triton's runs on its own capability only
constexpr double LEAST_MASS = 0x1p-60;  // as in selection.py, where any smaller share means the same
constexpr const int32_t *NO_LIMITS = nullptr;
constexpr double LOG2_E = 1.44269504088896340736;

std::mutex loading;
std::atomic<cudaKernel_t> loaded[std::size(CUBINS)];
std::atomic<uint64_t> prepared[std::size(CUBINS)];  // one bit for each of the first 64 devices

int failure(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return SMI_FAST_OK;
        case cudaErrorNoDevice:
        case cudaErrorInsufficientDriver:
        case cudaErrorStubLibrary: return SMI_FAST_NO_DEVICE;
        default: return SMI_FAST_CUDA_ERROR + error;
    }
}

int current_device(int *device, int *capability) {
    int major = 0, minor = 0;
    cudaError_t error = cudaGetDevice(device);
    if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, *device);
    if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, *device);
    *capability = 10 * major + minor;
    return failure(error);
}

// A cubin runs on its own compute capability and on later ones of the same major version.
bool runs(int arch, int capability) {
    if (arch >= FIRST_ARCH_WITHOUT_SUCCESSORS) return arch == capability;
    return arch / 10 == capability / 10 && arch <= capability;
}

// The newest architecture that was built and runs on the current device.
int best_arch(int *device, int *arch) {
    int capability;
    if (int status = current_device(device, &capability)) return status;
    *arch = 0;
    for (const Row &row : ROWS)
        if (runs(row.arch, capability)) *arch = std::max(*arch, row.arch);
    return *arch ? SMI_FAST_OK : SMI_FAST_UNSUPPORTED_DEVICE;
}

int load(int cubin, int device, cudaKernel_t *kernel) {
    *kernel = loaded[cubin].load(std::memory_order_acquire);
    if (!*kernel) {
        std::lock_guard<std::mutex> lock(loading);
        *kernel = loaded[cubin].load(std::memory_order_relaxed);
        if (!*kernel) {
            cudaLibrary_t library;
            const char *code = CUBINS[cubin].code;
            cudaError_t error = cudaLibraryLoadData(&library, code, nullptr, nullptr, 0, nullptr, nullptr, 0);
            if (!error) error = cudaLibraryGetKernel(kernel, library, CUBINS[cubin].name);
            if (error) return failure(error);
            loaded[cubin].store(*kernel, std::memory_order_release);
        }
    }
    const int shared_bytes = CUBINS[cubin].shared_bytes;
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (shared_bytes > SHARED_BYTES_WITHOUT_ASKING && !(prepared[cubin].load(std::memory_order_relaxed) & bit)) {
        const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
        if (auto error = cudaKernelSetAttributeForDevice(*kernel, most, shared_bytes, device)) return failure(error);
        prepared[cubin].fetch_or(bit, std::memory_order_relaxed);
    }
    return SMI_FAST_OK;
}

struct Found {
    const Row *row;
    cudaKernel_t kernel;

    const Cubin &cubin() const { return CUBINS[row->cubin]; }
};

// Find the kernel for an operation, the key of its rows, and a size.
int find(Operation operation, std::initializer_list<int> key, int size, Found *found) {
    const auto fits = [&](const Row &row) {
        return row.operation == operation && size <= row.up_to && std::equal(key.begin(), key.end(), row.key);
    };
    if (std::none_of(std::begin(ROWS), std::end(ROWS), fits)) return SMI_FAST_NOT_BUILT;
    int device, arch;
    if (int status = best_arch(&device, &arch)) return status;
    found->row = nullptr;
    for (const Row &row : ROWS)
        if (row.arch == arch && fits(row) && (!found->row || row.up_to < found->row->up_to)) found->row = &row;
    return found->row ? load(found->row->cubin, device, &found->kernel) : SMI_FAST_NOT_BUILT;
}

template <typename T>
constexpr char letter() {
    if (std::is_pointer_v<T>) return 'p';
    return std::is_same_v<T, float> ? 'f' : std::is_same_v<T, double> ? 'd' : std::is_same_v<T, int32_t> ? 'i' : '?';
}

template <Kernel kernel, typename... Arguments>
int launch(const Found &found, cudaStream_t stream, int64_t x, int64_t y, Arguments... arguments) {
    constexpr char letters[] = {letter<Arguments>()...};
    static_assert(std::string_view(letters, sizeof...(Arguments)) == parameters(kernel));
    if (x > INT32_MAX || y > UINT16_MAX) return SMI_FAST_INVALID_ARGUMENT;
    void *no_scratch = nullptr;  // Triton's kernels end with two pointers to scratch memory, which none of these uses
    void *pointers[] = {&arguments..., &no_scratch, &no_scratch};
    const Cubin &cubin = found.cubin();
    const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y)), threads(cubin.threads);
    return failure(cudaLaunchKernel(found.kernel, grid, threads, pointers, cubin.shared_bytes, stream));
}

// Rounded once, as in Python.
float in_log2(float scale) { return static_cast<float>(scale * LOG2_E); }

int64_t programs(int size, int block) { return block ? (int64_t{size} + block - 1) / block : 1; }

int check_present(std::initializer_list<const void *> pointers) {
    const bool present = std::none_of(pointers.begin(), pointers.end(), [](const void *p) { return p == nullptr; });
    return present ? SMI_FAST_OK : SMI_FAST_NULL_POINTER;
}

// Check pointers to memory that is accessed 16 bytes at a time. A null pointer counts as aligned.
int check_aligned(std::initializer_list<const void *> pointers) {
    const auto aligned = [](const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    return std::all_of(pointers.begin(), pointers.end(), aligned) ? SMI_FAST_OK : SMI_FAST_MISALIGNED_POINTER;
}

int check_sizes(int batch, int tokens, int max_seqlen, int heads) {
    if (batch < 0 || tokens < 0 || heads < 1 || max_seqlen < 0) return SMI_FAST_INVALID_ARGUMENT;
    return tokens > int64_t{batch} * max_seqlen ? SMI_FAST_INVALID_ARGUMENT : SMI_FAST_OK;
}

int itemsize(smi_fast_dtype dtype) { return dtype == SMI_FAST_FLOAT32 ? 4 : 2; }

}  // namespace

const char *smi_fast_status_string(int status) {
    switch (status) {
        case SMI_FAST_OK: return "no error";
        case SMI_FAST_INVALID_ARGUMENT: return "a size is negative or contradicts another";
        case SMI_FAST_NULL_POINTER: return "a pointer that is needed is null";
        case SMI_FAST_MISALIGNED_POINTER: return "a pointer is not aligned to 16 bytes";
        case SMI_FAST_NOT_BUILT: return "the library was built without kernels for this dtype or these sizes";
        case SMI_FAST_UNSUPPORTED_DEVICE: return "the library was built without kernels for the current device";
        case SMI_FAST_NO_DEVICE: return "there is no NVIDIA GPU, or no driver for it";
    }
    if (status < SMI_FAST_CUDA_ERROR) return "unknown status";
    return cudaGetErrorString(static_cast<cudaError_t>(status - SMI_FAST_CUDA_ERROR));
}

int smi_fast_load() {
    int device, arch;
    if (int status = best_arch(&device, &arch)) return status;
    for (const Row &row : ROWS) {
        if (row.arch != arch) continue;
        cudaKernel_t kernel;
        cudaFuncAttributes attributes;  // asking for them moves the code to the device now and not at the first launch
        if (int status = load(row.cubin, device, &kernel)) return status;
        if (auto error = cudaFuncGetAttributes(&attributes, kernel)) return failure(error);
    }
    return SMI_FAST_OK;
}

int smi_fast_attention(cudaStream_t stream, smi_fast_dtype dtype, void *out, float *class_attention, float *statistics,
                       const void *qkv, const int32_t *cu_seqlens, int batch, int tokens, int max_seqlen, int heads,
                       int head_dim, float scale) {
    if (int status = check_sizes(batch, tokens, max_seqlen, heads)) return status;
    if (tokens == 0) return SMI_FAST_OK;
    if (int status = check_present({out, qkv, cu_seqlens})) return status;
    if (int status = check_aligned({out, qkv})) return status;
    const int flags = (class_attention ? 1 : 0) | (statistics ? 2 : 0);
    Found found;
    if (int status = find(Operation::attention_forward, {dtype, head_dim, flags}, max_seqlen, &found)) return status;
    float *shares = statistics ? statistics + int64_t{heads} * tokens : nullptr;
    return launch<Kernel::tile_forward>(  // or blocks_forward, whose parameters are the same
        found, stream, int64_t{batch} * heads, programs(max_seqlen, found.row->block[0]), out, class_attention,
        statistics, shares, qkv, cu_seqlens, in_log2(scale), tokens, heads);
}

int smi_fast_attention_backward(cudaStream_t stream, smi_fast_dtype dtype, void *grad_qkv, float *workspace,
                                const void *grad_out, const void *qkv, const void *out, const float *statistics,
                                const int32_t *cu_seqlens, int batch, int tokens, int max_seqlen, int heads,
                                int head_dim, float scale) {
    if (int status = check_sizes(batch, tokens, max_seqlen, heads)) return status;
    if (tokens == 0) return SMI_FAST_OK;
    if (int status = check_present({grad_qkv, workspace, grad_out, qkv, out, statistics, cu_seqlens})) return status;
    if (int status = check_aligned({grad_qkv, grad_out, qkv, out})) return status;
    Found found;
    if (int status = find(Operation::attention_backward, {dtype, head_dim}, max_seqlen, &found)) return status;
    const float *shares = statistics + int64_t{heads} * tokens;
    const float scale_log2 = in_log2(scale);
    const int64_t x = int64_t{batch} * heads, y = programs(max_seqlen, found.row->block[0]);
    switch (found.cubin().kernel) {
        case Kernel::tile_backward:
            return launch<Kernel::tile_backward>(found, stream, x, y, grad_qkv, grad_out, qkv, cu_seqlens, scale,
                                                 scale_log2, heads);
        case Kernel::rows_backward:
            return launch<Kernel::rows_backward>(found, stream, x, y, grad_qkv, grad_out, qkv, out, statistics, shares,
                                                 cu_seqlens, scale, scale_log2, tokens, heads);
        default: break;
    }
    Found dkv;
    if (int status = find(Operation::attention_backward_dkv, {dtype, head_dim}, max_seqlen, &dkv)) return status;
    const int status = launch<Kernel::blocks_dq>(found, stream, x, y, grad_qkv, workspace, grad_out, qkv, out,
                                                 statistics, shares, cu_seqlens, scale, scale_log2, tokens, heads);
    if (status) return status;
    return launch<Kernel::blocks_dkv>(dkv, stream, x, programs(max_seqlen, dkv.row->block[0]), grad_qkv, workspace,
                                      grad_out, qkv, statistics, shares, cu_seqlens, scale, scale_log2, tokens, heads);
}

int smi_fast_class_attention(cudaStream_t stream, smi_fast_dtype dtype, void *out, float *attention, float *statistics,
                             const void *q, const void *kv, const int32_t *cu_seqlens, int batch, int tokens,
                             int max_seqlen, int heads, int head_dim, float scale) {
    if (int status = check_sizes(batch, tokens, max_seqlen, heads)) return status;
    if (batch == 0) return SMI_FAST_OK;
    if (int status = check_present({out, attention, statistics, q, kv, cu_seqlens})) return status;
    if (int status = check_aligned({out, q, kv})) return status;
    Found found;
    if (int status = find(Operation::class_attention_forward, {dtype, head_dim}, max_seqlen, &found)) return status;
    return launch<Kernel::class_forward>(found, stream, int64_t{batch} * heads, 1, out, attention, statistics, q, kv,
                                         cu_seqlens, in_log2(scale), tokens, heads);
}

int smi_fast_class_attention_backward(cudaStream_t stream, smi_fast_dtype dtype, void *grad_q, void *grad_kv,
                                      const void *grad_out, const void *q, const void *kv, const float *statistics,
                                      const int32_t *cu_seqlens, int batch, int tokens, int max_seqlen, int heads,
                                      int head_dim, float scale) {
    if (int status = check_sizes(batch, tokens, max_seqlen, heads)) return status;
    if (batch == 0) return SMI_FAST_OK;
    if (int status = check_present({grad_q, grad_kv, grad_out, q, kv, statistics, cu_seqlens})) return status;
    if (int status = check_aligned({grad_q, grad_kv, grad_out, q, kv})) return status;
    Found found;
    if (int status = find(Operation::class_attention_backward, {dtype, head_dim}, max_seqlen, &found)) return status;
    return launch<Kernel::class_backward>(found, stream, int64_t{batch} * heads, 1, grad_q, grad_kv, grad_out, q, kv,
                                          statistics, cu_seqlens, scale, in_log2(scale), heads);
}

int smi_fast_select(cudaStream_t stream, smi_fast_dtype dtype, void *kept_values, int32_t *kept_positions,
                    int32_t *kept_cu_seqlens, int32_t *slots, const float *attention, const void *values,
                    const int32_t *positions, const int32_t *cu_seqlens, const int32_t *starts, int k, int batch,
                    int tokens, int max_seqlen, int heads, int channels, int num_prefix_tokens) {
    if (int status = check_sizes(batch, tokens, max_seqlen, heads)) return status;
    if (channels < 0 || num_prefix_tokens < 0) return SMI_FAST_INVALID_ARGUMENT;
    const int candidates = max_seqlen - num_prefix_tokens;
    if (!starts && (k < 1 || k > candidates)) return SMI_FAST_INVALID_ARGUMENT;
    if (int status = check_present({kept_cu_seqlens})) return status;
    if (batch == 0) return failure(cudaMemsetAsync(kept_cu_seqlens, 0, sizeof(int32_t), stream));
    if (candidates < 1) return SMI_FAST_INVALID_ARGUMENT;
    if (int status = check_present({kept_positions, slots, attention, positions, cu_seqlens})) return status;
    const int64_t row_bytes = values ? int64_t{channels} * itemsize(dtype) : 0;
    if (row_bytes && !kept_values) return SMI_FAST_NULL_POINTER;
    if (int status = check_aligned({kept_values, values})) return status;
    if (row_bytes % 16) return SMI_FAST_NOT_BUILT;
    Found found;
    if (int status = find(Operation::select, {heads, starts ? 1 : 0}, candidates, &found)) return status;
    const int units = static_cast<int>(row_bytes / 16);
    return launch<Kernel::select>(found, stream, batch, programs(max_seqlen, found.row->block[0]), kept_values,
                                  kept_positions, kept_cu_seqlens, slots, attention + num_prefix_tokens, values,
                                  positions + num_prefix_tokens, cu_seqlens, starts, NO_LIMITS, max_seqlen,
                                  num_prefix_tokens, units, k, tokens, units, units);
}

int smi_fast_count_mass(cudaStream_t stream, int32_t *counts, int32_t *limits, const float *attention,
                        const int32_t *cu_seqlens, double mass, int batch, int tokens, int max_seqlen, int heads,
                        int num_prefix_tokens) {
    if (int status = check_sizes(batch, tokens, max_seqlen, heads)) return status;
    if (num_prefix_tokens < 0 || !(mass > 0 && mass <= 1)) return SMI_FAST_INVALID_ARGUMENT;
    if (int status = check_present({counts})) return status;
    if (batch == 0) return failure(cudaMemsetAsync(counts, 0, sizeof(int32_t), stream));
    if (max_seqlen <= num_prefix_tokens) return SMI_FAST_INVALID_ARGUMENT;
    if (int status = check_present({limits, attention, cu_seqlens})) return status;
    Found found;
    if (int status = find(Operation::count_mass, {heads}, max_seqlen - num_prefix_tokens, &found)) return status;
    return launch<Kernel::count>(found, stream, batch, 1, counts, limits, attention + num_prefix_tokens, cu_seqlens,
                                 max_seqlen, num_prefix_tokens, std::max(mass, LEAST_MASS), tokens);
}

int smi_fast_select_backward(cudaStream_t stream, smi_fast_dtype dtype, void *grad_values,
                             const void *grad_kept_values, const int32_t *slots, int tokens, int channels) {
    if (tokens < 0 || channels < 0) return SMI_FAST_INVALID_ARGUMENT;
    if (tokens == 0 || channels == 0) return SMI_FAST_OK;
    if (int status = check_present({grad_values, grad_kept_values, slots})) return status;
    if (int status = check_aligned({grad_values, grad_kept_values})) return status;
    const int64_t row_bytes = int64_t{channels} * itemsize(dtype);
    if (row_bytes % 16) return SMI_FAST_NOT_BUILT;
    Found found;
    if (int status = find(Operation::select_backward, {}, 0, &found)) return status;
    const int units = static_cast<int>(row_bytes / 16);
    const int64_t blocks = programs(tokens, found.row->block[0]) * programs(units, found.row->block[1]);
    return launch<Kernel::select_backward>(found, stream, blocks, 1, grad_values, grad_kept_values, slots, tokens,
                                           units, units);
}

namespace {

struct Geometry {
    int batch, channels, height, width, patch_height, patch_width;
};

int find_patches(Operation operation, smi_fast_dtype dtype, const int32_t *view, int views, const Geometry &g,
                 Found *found) {
    if (g.batch < 0 || (view && views != 1 && views != g.batch)) return SMI_FAST_INVALID_ARGUMENT;
    const int what = dtype | (view ? 4 : 0);
    return find(operation, {what, g.channels, g.height, g.width, g.patch_height, g.patch_width}, 0, found);
}

int64_t blocks_of_cells(const Geometry &g, const Found &found) {
    return programs((g.height / g.patch_height) * (g.width / g.patch_width), found.row->block[0]);
}

}  // namespace

int smi_fast_gather_patches(cudaStream_t stream, smi_fast_dtype dtype, void *patches, int32_t *cells, int32_t *inverse,
                            const float *images, const int32_t *positions, const int32_t *cu_seqlens,
                            const int32_t *view, int views, int batch, int channels, int height, int width,
                            int patch_height, int patch_width) {
    if (batch == 0) return SMI_FAST_OK;
    if (int status = check_present({patches, cells, inverse, images, positions, cu_seqlens})) return status;
    if (int status = check_aligned({patches, images})) return status;
    const Geometry geometry{batch, channels, height, width, patch_height, patch_width};
    Found found;
    if (int status = find_patches(Operation::gather_patches, dtype, view, views, geometry, &found)) return status;
    return launch<Kernel::gather>(found, stream, batch, blocks_of_cells(geometry, found), patches, cells, inverse,
                                  images, positions, cu_seqlens, view, views == 1 ? 0 : 3);
}

int smi_fast_gather_patches_backward(cudaStream_t stream, smi_fast_dtype dtype, float *grad_images,
                                     const void *grad_patches, const int32_t *inverse, const int32_t *view, int views,
                                     int batch, int channels, int height, int width, int patch_height,
                                     int patch_width) {
    if (batch == 0) return SMI_FAST_OK;
    if (int status = check_present({grad_images, grad_patches, inverse})) return status;
    if (int status = check_aligned({grad_images, grad_patches})) return status;
    const Geometry geometry{batch, channels, height, width, patch_height, patch_width};
    const auto operation = Operation::gather_patches_backward;
    Found found;
    if (int status = find_patches(operation, dtype, view, views, geometry, &found)) return status;
    return launch<Kernel::gather_backward>(found, stream, batch, blocks_of_cells(geometry, found), grad_images,
                                           grad_patches, inverse, view, views == 1 ? 0 : 3);
}
