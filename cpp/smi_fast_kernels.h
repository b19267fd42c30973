/* The kernels of smi-fast, compiled ahead of time: attention over packed sequences, selection of patches, and patches
   cut out of images. No Python, no compilation at run time.

   Every function enqueues its work on a stream of the current device and returns at once with a status. None of them
   synchronises, allocates device memory or throws. All pointers are to device memory. Functions may be called from
   several threads.

   Sequences are packed: B = batch of them lie end to end, T = tokens in all, and sequence b is the tokens from
   cu_seqlens[b] to cu_seqlens[b + 1], where cu_seqlens is (B + 1) int32 that starts with 0. max_seqlen is the length of
   the longest sequence; if it is smaller than that, results are wrong. H = heads, D = head_dim. All arrays are
   contiguous, in the order of dimensions given. Arrays of `dtype`, values and images must be aligned to 16 bytes, as
   those of cudaMalloc are. All others must be aligned as their elements are. */

#ifndef SMI_FAST_KERNELS_H
#define SMI_FAST_KERNELS_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SMI_FAST_API __attribute__((visibility("default")))
#else
#define SMI_FAST_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { SMI_FAST_FLOAT32 = 0, SMI_FAST_BFLOAT16 = 1, SMI_FAST_FLOAT16 = 2 } smi_fast_dtype;

enum {
    SMI_FAST_OK = 0,
    SMI_FAST_INVALID_ARGUMENT = 1, /* a size is negative, or sizes contradict each other */
    SMI_FAST_NULL_POINTER = 2,
    SMI_FAST_MISALIGNED_POINTER = 3,
    SMI_FAST_NOT_BUILT = 4,          /* no such dtype, head_dim, heads, geometry or length: see CMakeLists.txt */
    SMI_FAST_UNSUPPORTED_DEVICE = 5, /* built, but not for an architecture that the current device runs */
    SMI_FAST_NO_DEVICE = 6,          /* no NVIDIA GPU, or no driver for it */
    SMI_FAST_CUDA_ERROR = 1000       /* and above: this plus a cudaError_t */
};

/* What a status means, in English. */
SMI_FAST_API const char *smi_fast_status_string(int status);

/* Load all kernels for the current device, which are otherwise loaded when they are first used. Call it before a CUDA
   graph is captured, or if no call may take longer than others. */
SMI_FAST_API int smi_fast_load(void);

/* Compute softmax(scale * q k^T) v within each sequence.
   out              (T, H, D) of dtype.
   class_attention  (H, T) float32, or NULL: how much the first token of each sequence attends to every token.
   statistics       (2, H, T) float32, or NULL: what smi_fast_attention_backward needs.
   qkv              (T, 3, H, D) of dtype: the output of the qkv projection. */
SMI_FAST_API int smi_fast_attention(cudaStream_t stream, smi_fast_dtype dtype, void *out, float *class_attention,
                                    float *statistics, const void *qkv, const int32_t *cu_seqlens, int batch,
                                    int tokens, int max_seqlen, int heads, int head_dim, float scale);

/* Compute the gradient of smi_fast_attention.
   grad_qkv    (T, 3, H, D) of dtype: every element is written once.
   workspace   (H, T) float32, of any contents.
   grad_out, out  (T, H, D) of dtype; out and statistics as smi_fast_attention wrote them. */
SMI_FAST_API int smi_fast_attention_backward(cudaStream_t stream, smi_fast_dtype dtype, void *grad_qkv,
                                             float *workspace, const void *grad_out, const void *qkv, const void *out,
                                             const float *statistics, const int32_t *cu_seqlens, int batch, int tokens,
                                             int max_seqlen, int heads, int head_dim, float scale);

/* Compute attention with one query for each sequence, as a last block needs it for its class token.
   out         (B, H, D) of dtype, zero where a sequence is empty.
   attention   (H, T) float32: each head's softmax row.
   statistics  (B, H, 2) float32.
   q           (B, H, D) of dtype.    kv  (T, 2, H, D) of dtype. */
SMI_FAST_API int smi_fast_class_attention(cudaStream_t stream, smi_fast_dtype dtype, void *out, float *attention,
                                          float *statistics, const void *q, const void *kv, const int32_t *cu_seqlens,
                                          int batch, int tokens, int max_seqlen, int heads, int head_dim, float scale);

/* Compute the gradient of smi_fast_class_attention: grad_q (B, H, D) and grad_kv (T, 2, H, D) of dtype, from grad_out
   (B, H, D) of dtype and the arguments of the forward pass. */
SMI_FAST_API int smi_fast_class_attention_backward(cudaStream_t stream, smi_fast_dtype dtype, void *grad_q,
                                                   void *grad_kv, const void *grad_out, const void *q, const void *kv,
                                                   const float *statistics, const int32_t *cu_seqlens, int batch,
                                                   int tokens, int max_seqlen, int heads, int head_dim, float scale);

/* Keep the most important tokens of each sequence and gather them, in their order, into a packed batch of T' tokens.
   Importance is the mean of attention over the heads. Among equals the lower index stays. The first num_prefix_tokens
   of a sequence always stay, whatever their attention is. NaN stops the device with an assertion.
   kept_values      (T', C) of dtype, C = channels, or NULL if values is. A row must be a multiple of 16 bytes.
   kept_positions   (T') int32.
   kept_cu_seqlens  (B + 1) int32.
   slots            (T) int32: the row of T' that a token went to, or -1.
   attention        (H, T) float32, such as class_attention. H may be 1.
   values           (T, C) of dtype, or NULL.
   positions        (T) int32, carried along, such as the index of a patch in the grid.
   starts           (B + 1) int32, the cumulative lengths of what stays, prefix tokens included; or NULL, and k patches
                    of each sequence stay: T' = B * (num_prefix_tokens + k).
   A sequence with fewer candidates than shall stay stops the device too. */
SMI_FAST_API int smi_fast_select(cudaStream_t stream, smi_fast_dtype dtype, void *kept_values, int32_t *kept_positions,
                                 int32_t *kept_cu_seqlens, int32_t *slots, const float *attention, const void *values,
                                 const int32_t *positions, const int32_t *cu_seqlens, const int32_t *starts, int k,
                                 int batch, int tokens, int max_seqlen, int heads, int channels,
                                 int num_prefix_tokens);

/* Count the fewest tokens of each sequence that hold at least the share `mass`, in (0, 1], of its importance. The
   cumulative sum of the counts is what smi_fast_select takes as starts.
   counts  (B + 1) int32: zero, then a count for each sequence, prefix tokens included.
   limits  (B, 2) int32, a workspace. */
SMI_FAST_API int smi_fast_count_mass(cudaStream_t stream, int32_t *counts, int32_t *limits, const float *attention,
                                     const int32_t *cu_seqlens, double mass, int batch, int tokens, int max_seqlen,
                                     int heads, int num_prefix_tokens);

/* Compute the gradient of smi_fast_select: grad_values (T, C) of dtype is the row of grad_kept_values (T', C) where a
   token stayed, and zero elsewhere. */
SMI_FAST_API int smi_fast_select_backward(cudaStream_t stream, smi_fast_dtype dtype, void *grad_values,
                                          const void *grad_kept_values, const int32_t *slots, int tokens,
                                          int channels);

/* Cut the patches at some positions of the grid out of B images. The images are seen through a view: rolled by
   (dy, dx), then mirrored left-right if flip is not 0. The viewed images are never stored.
   patches     (T, C, patch_height, patch_width) of dtype.
   cells       (T) int32, the cell of the grid in which each patch is seen.
   inverse     (B, rows, columns) int32, the patch that is seen in each cell, or -1.
   images      (B, C, height, width) float32.
   positions   (T) int32, row-major in the grid, packed by cu_seqlens; no two of an image are equal.
   view        int32 (dy, dx, flip), (3) for all images together or (B, 3), or NULL.    views  1 or batch. */
SMI_FAST_API int smi_fast_gather_patches(cudaStream_t stream, smi_fast_dtype dtype, void *patches, int32_t *cells,
                                         int32_t *inverse, const float *images, const int32_t *positions,
                                         const int32_t *cu_seqlens, const int32_t *view, int views, int batch,
                                         int channels, int height, int width, int patch_height, int patch_width);

/* Compute the gradient of smi_fast_gather_patches: grad_images (B, C, height, width) float32, zero where no patch was.
   Every pixel is written once. grad_patches is of dtype; inverse and view are those of the forward pass. */
SMI_FAST_API int smi_fast_gather_patches_backward(cudaStream_t stream, smi_fast_dtype dtype, float *grad_images,
                                                  const void *grad_patches, const int32_t *inverse,
                                                  const int32_t *view, int views, int batch, int channels, int height,
                                                  int width, int patch_height, int patch_width);

#ifdef __cplusplus
}
#endif

#endif
