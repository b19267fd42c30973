// How long a process waits for its first attention, and for the next: cold_start.py runs this beside Python's.
#include <cuda_runtime_api.h>
#include <smi_fast_kernels.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

static void check(int status) {
    if (status == SMI_FAST_OK) return;
    std::fprintf(stderr, "smi_fast: %s\n", smi_fast_status_string(status));
    std::exit(2);
}

static void check(cudaError_t error) { check(error ? SMI_FAST_CUDA_ERROR + error : SMI_FAST_OK); }

int main() {
    const int batch = 8, length = 47, tokens = batch * length, heads = 3, head_dim = 64;
    int32_t starts[batch + 1];
    for (int b = 0; b <= batch; b++) starts[b] = b * length;
    void *qkv, *out, *cu_seqlens;
    check(cudaFree(nullptr));  // the context is not what is measured
    check(cudaMalloc(&qkv, size_t(tokens) * 3 * heads * head_dim * 2));
    check(cudaMalloc(&out, size_t(tokens) * heads * head_dim * 2));
    check(cudaMalloc(&cu_seqlens, sizeof starts));
    check(cudaMemset(qkv, 0, size_t(tokens) * 3 * heads * head_dim * 2));
    check(cudaMemcpy(cu_seqlens, starts, sizeof starts, cudaMemcpyHostToDevice));
    double milliseconds[2];
    for (double &time : milliseconds) {
        check(cudaDeviceSynchronize());
        const auto before = std::chrono::steady_clock::now();
        check(smi_fast_attention(nullptr, SMI_FAST_BFLOAT16, out, nullptr, nullptr, qkv,
                                 static_cast<int32_t *>(cu_seqlens), batch, tokens, length, heads, head_dim, 0.125f));
        check(cudaDeviceSynchronize());
        time = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - before).count();
    }
    std::printf("{\"first_ms\": %.3f, \"next_ms\": %.3f}\n", milliseconds[0], milliseconds[1]);
    return 0;
}
