// Attention over packed sequences, and the tokens that the class token attends to most, gathered into a shorter batch:
// what a pruned Vision Transformer does between its matrix products, without Python. Checks the result against loops.
//
//   keep_patches         exits with 0, or with 1 where a number is wrong, or with 2 where there is nothing to run on
#include <cuda_runtime_api.h>
#include <smi_fast_kernels.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

static void check(int status) {
    if (status == SMI_FAST_OK) return;
    std::fprintf(stderr, "smi_fast: %s\n", smi_fast_status_string(status));
    std::exit(status == SMI_FAST_NO_DEVICE || status == SMI_FAST_UNSUPPORTED_DEVICE ? 2 : 1);
}

static void check(cudaError_t error) { check(error ? SMI_FAST_CUDA_ERROR + error : SMI_FAST_OK); }

// Device memory; lives as long as the program.
template <typename T>
static T *on_device(size_t count, const T *values = nullptr) {
    void *memory = nullptr;
    check(cudaMalloc(&memory, count * sizeof(T)));
    if (values) check(cudaMemcpy(memory, values, count * sizeof(T), cudaMemcpyHostToDevice));
    return static_cast<T *>(memory);
}

template <typename T>
static std::vector<T> on_host(const T *memory, size_t count) {
    std::vector<T> values(count);
    check(cudaMemcpy(values.data(), memory, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
}

int main() {
    check(smi_fast_load());  // says at once where there is nothing to run on

    const int lengths[] = {197, 138, 47}, batch = 3, heads = 3, head_dim = 64, prefix = 1, k = 46, max_seqlen = 197;
    std::vector<int32_t> starts{0}, positions;
    for (int length : lengths) {
        starts.push_back(starts.back() + length);
        for (int n = 0; n < length; n++) positions.push_back(n - prefix);
    }
    const int tokens = starts.back(), width = heads * head_dim, kept = batch * (prefix + k);
    const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    std::vector<float> qkv(size_t(tokens) * 3 * width);
    std::generate(qkv.begin(), qkv.end(), [&] { return normal(random); });

    auto *d_qkv = on_device(qkv.size(), qkv.data());
    auto *d_starts = on_device(starts.size(), starts.data());
    auto *d_positions = on_device(positions.size(), positions.data());
    auto *out = on_device<float>(size_t(tokens) * width);
    auto *attention = on_device<float>(size_t(heads) * tokens);
    auto *kept_out = on_device<float>(size_t(kept) * width);
    auto *kept_positions = on_device<int32_t>(kept);
    auto *kept_starts = on_device<int32_t>(batch + 1);
    auto *slots = on_device<int32_t>(tokens);

    cudaStream_t stream;
    check(cudaStreamCreate(&stream));
    check(smi_fast_attention(stream, SMI_FAST_FLOAT32, out, attention, nullptr, d_qkv, d_starts, batch, tokens,
                             max_seqlen, heads, head_dim, scale));
    check(smi_fast_select(stream, SMI_FAST_FLOAT32, kept_out, kept_positions, kept_starts, slots, attention, out,
                          d_positions, d_starts, nullptr, k, batch, tokens, max_seqlen, heads, width, prefix));
    check(cudaStreamSynchronize(stream));

    const auto outs = on_host(out, size_t(tokens) * width), rows = on_host(attention, size_t(heads) * tokens);
    const auto kept_outs = on_host(kept_out, size_t(kept) * width);
    const auto kept_ats = on_host(kept_positions, kept);
    double error = 0;
    bool close = true, same = true;
    const auto compare = [&](double expected, float found) {
        close &= std::abs(expected - found) < 1e-5;  // false of NaN
        error = std::max(error, std::abs(expected - found));
    };
    for (int b = 0; b < batch; b++) {
        const int first = starts[b], length = lengths[b];
        const auto at = [&](int token, int which, int head) {  // which: 0 of q, 1 of k, 2 of v
            return &qkv[(size_t(token) * 3 + which) * width + head * head_dim];
        };
        for (int head = 0; head < heads; head++) {
            for (int m = 0; m < length; m++) {
                std::vector<double> p(length);
                for (int n = 0; n < length; n++) {
                    const float *q = at(first + m, 0, head), *key = at(first + n, 1, head);
                    p[n] = std::exp(scale * std::inner_product(q, q + head_dim, key, 0.0));
                }
                const double sum = std::accumulate(p.begin(), p.end(), 0.0);
                for (int n = 0; n < length && m == 0; n++) {
                    compare(p[n] / sum, rows[size_t(head) * tokens + first + n]);
                }
                for (int d = 0; d < head_dim; d++) {
                    double expected = 0;
                    for (int n = 0; n < length; n++) expected += p[n] / sum * at(first + n, 2, head)[d];
                    compare(expected, outs[size_t(first + m) * width + head * head_dim + d]);
                }
            }
        }
        // The same picks, by a stable sort of the attention's mean over the heads.
        std::vector<float> importance(length, 0);
        for (int head = 0; head < heads; head++)
            for (int n = 0; n < length; n++) importance[n] += rows[size_t(head) * tokens + first + n];
        for (float &value : importance) value = static_cast<float>(value * (1.0 / heads));
        std::vector<int> order(length - prefix);
        std::iota(order.begin(), order.end(), prefix);
        std::stable_sort(order.begin(), order.end(), [&](int a, int c) { return importance[a] > importance[c]; });
        order.resize(k);
        for (int p = 0; p < prefix; p++) order.push_back(p);
        std::sort(order.begin(), order.end());
        for (int i = 0; i < prefix + k; i++) {
            const int slot = b * (prefix + k) + i, source = first + order[i];
            same &= kept_ats[slot] == positions[source];
            same &= std::equal(&outs[size_t(source) * width], &outs[size_t(source) * width] + width,
                               &kept_outs[size_t(slot) * width]);
        }
    }
    std::printf("%d of %d tokens kept; attention differs from plain loops by %.1e at most, the selection %s\n", kept,
                tokens, error, same ? "is the same" : "differs");
    return close && same ? 0 : 1;
}
