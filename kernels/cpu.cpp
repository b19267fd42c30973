// The operators in one pass each, for a CPU. `cpu.py` compiles this file for the machine it runs on and calls it.
//
// Rows are float32 or bfloat16 in memory (`Type`) and float32 in between. Loops over rows, heads or patches are shared
// among the threads of OpenMP, which are torch's own; no result depends on how many there are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace {

enum Type : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// A row of a tensor, or nothing.
struct Rows {
  char* data;
  Type type;
  int64_t stride;  // in elements

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  T* row(int64_t number) const {
    return reinterpret_cast<T*>(data) + number * stride;
  }
};

inline float widen(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// Rounds to nearest, ties to even, as torch does.
inline uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

// Returns row `number` as float32: where it lies, or converted in the buffer.
const float* load(const Rows& rows, int64_t number, float* __restrict buffer, int64_t n) {
  if (rows.type == kFloat32) return rows.row<float>(number);
  const uint16_t* x = rows.row<uint16_t>(number);
  for (int64_t i = 0; i < n; ++i) buffer[i] = widen(x[i]);
  return buffer;
}

// Returns where row `number` may be written as float32; `store` then puts it where it belongs.
float* target(const Rows& rows, int64_t number, float* buffer) {
  return rows.type == kFloat32 ? rows.row<float>(number) : buffer;
}

void store(const Rows& rows, int64_t number, const float* __restrict x, int64_t n) {
  if (rows.type == kFloat32) return;
  uint16_t* out = rows.row<uint16_t>(number);
  for (int64_t i = 0; i < n; ++i) out[i] = narrow(x[i]);
}

Rows rows(void* data, int64_t type, int64_t stride, int64_t offset = 0) {
  return {static_cast<char*>(data) + offset * (type == kFloat32 ? 4 : 2), Type(type), stride};
}

// With fewer elements than this, a second thread costs more than it saves.
constexpr int64_t kWorth = 1 << 14;

// Memory of the calling thread, kept for the next call.
float* scratch(size_t floats) {
  thread_local std::vector<float> memory;
  if (memory.size() < floats) memory.resize(floats);
  return memory.data();
}

#ifdef __AVX512F__
constexpr int kLanes = 16, kTileRows = 6, kTileVectors = 4;  // 24 of 32 registers accumulate
#else
constexpr int kLanes = 8, kTileRows = 4, kTileVectors = 3;  // 12 of 16
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// A sum of many terms, in an order that hangs on their number alone.
struct Sum {
  float parts[kLanes] = {};

  // Adds term(i) for i in 0..n-1.
  template <class F>
  void add(int64_t n, F term) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) parts[lane] += term(i + lane);
    for (int lane = 0; i < n; ++i, ++lane) parts[lane] += term(i);
  }
  float total() {
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
    return parts[0];
  }
};

template <class F>
float sum(int64_t n, F term) {
  Sum terms;
  terms.add(n, term);
  return terms.total();
}

// ---- Residual sum and LayerNorm

constexpr int64_t kMaxChannels = 4096;

// Returns one row, such as a weight, as float32, and the value `otherwise` in each place if there is none.
const float* widened(const Rows& rows, float* buffer, int64_t n, float otherwise) {
  if (rows) return load(rows, 0, buffer, n);
  std::fill(buffer, buffer + n, otherwise);
  return buffer;
}

void residual_norm_row(const Rows& out, const Rows& normed, float* statistics, const Rows& x, const Rows& update,
                       const float* gamma, const float* weight, const float* bias, float eps, int64_t row, int64_t n) {
  float buffers[3][kMaxChannels];
  const float* s = load(x, row, buffers[0], n);
  if (update) {
    const float* added = load(update, row, buffers[1], n);
    float* __restrict total = target(out, row, buffers[2]);
    for (int64_t i = 0; i < n; ++i) total[i] = s[i] + added[i] * gamma[i];
    store(out, row, total, n);
    s = load(out, row, buffers[0], n);  // the norm is that of the rounded stream
  }
  const float mean = sum(n, [&](int64_t i) { return s[i]; }) / n;
  const float variance = sum(n, [&](int64_t i) { return (s[i] - mean) * (s[i] - mean); }) / n;
  const float rstd = 1 / std::sqrt(variance + eps);
  float* __restrict scaled = target(normed, row, buffers[1]);
  for (int64_t i = 0; i < n; ++i) scaled[i] = (s[i] - mean) * rstd * weight[i] + bias[i];
  store(normed, row, scaled, n);
  statistics[2 * row] = mean;
  statistics[2 * row + 1] = rstd;
}

void residual_norm_backward_row(const Rows& grad_x, const Rows& grad_update, const Rows& grad_stream,
                                const Rows& grad_normed, const Rows& x, const float* statistics, const float* gamma,
                                const float* weight, int64_t row, int64_t n) {
  float buffers[4][kMaxChannels];
  const float mean = statistics[2 * row], rstd = statistics[2 * row + 1];
  const float* incoming = load(grad_normed, row, buffers[0], n);
  const float* s = load(x, row, buffers[1], n);
  float* __restrict g = buffers[2];
  for (int64_t i = 0; i < n; ++i) g[i] = incoming[i] * weight[i];
  const float mean_g = sum(n, [&](int64_t i) { return g[i]; }) / n;
  const float mean_gs = sum(n, [&](int64_t i) { return g[i] * ((s[i] - mean) * rstd); }) / n;
  for (int64_t i = 0; i < n; ++i) g[i] = (g[i] - mean_g - (s[i] - mean) * rstd * mean_gs) * rstd;
  if (grad_stream) {
    const float* added = load(grad_stream, row, buffers[3], n);
    for (int64_t i = 0; i < n; ++i) g[i] += added[i];
  }
  if (grad_x) {
    float* __restrict result = target(grad_x, row, buffers[3]);
    for (int64_t i = 0; i < n; ++i) result[i] = g[i];
    store(grad_x, row, g, n);
  }
  if (grad_update) {
    float* __restrict result = target(grad_update, row, buffers[3]);
    for (int64_t i = 0; i < n; ++i) result[i] = g[i] * gamma[i];
    store(grad_update, row, result, n);
  }
}

// ---- Small matrix products

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A matrix whose element (i, k) is at data[i * row + k * column].
struct Matrix {
  const float* data;
  int64_t row, column;
};

template <int M, int V>
void tile(int64_t depth, const Matrix& a, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  Vector total[M][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[V];
    for (int v = 0; v < V; ++v) right[v] = *reinterpret_cast<const Vector*>(b + k * b_stride + v * kLanes);
    for (int i = 0; i < M; ++i) {
      const float left = a.data[i * a.row + k * a.column];
      for (int v = 0; v < V; ++v) total[i][v] += left * right[v];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) *reinterpret_cast<Vector*>(c + i * c_stride + v * kLanes) = total[i][v];
}

template <int M>
void tile_row(int vectors, int64_t depth, const Matrix& a, const float* b, int64_t b_stride, float* c,
              int64_t c_stride) {
  if constexpr (kTileVectors > 3)
    if (vectors == 4) return tile<M, 4>(depth, a, b, b_stride, c, c_stride);
  if (vectors == 3) return tile<M, 3>(depth, a, b, b_stride, c, c_stride);
  if (vectors == 2) return tile<M, 2>(depth, a, b, b_stride, c, c_stride);
  tile<M, 1>(depth, a, b, b_stride, c, c_stride);
}

// c (m, n) = a (m, depth) b (depth, n), where n is a multiple of kLanes.
void multiply(int64_t m, int64_t n, int64_t depth, const Matrix& a, const float* b, int64_t b_stride, float* c,
              int64_t c_stride) {
  for (int64_t j = 0; j < n; j += kTileVectors * kLanes) {
    const int vectors = int(std::min<int64_t>(kTileVectors, (n - j) / kLanes));
    int64_t i = 0;
    for (; i + kTileRows <= m; i += kTileRows)
      tile_row<kTileRows>(vectors, depth, {a.data + i * a.row, a.row, a.column}, b + j, b_stride, c + i * c_stride + j,
                          c_stride);
    for (; i + 2 <= m; i += 2)
      tile_row<2>(vectors, depth, {a.data + i * a.row, a.row, a.column}, b + j, b_stride, c + i * c_stride + j,
                  c_stride);
    if (i < m)
      tile_row<1>(vectors, depth, {a.data + i * a.row, a.row, a.column}, b + j, b_stride, c + i * c_stride + j,
                  c_stride);
  }
}

void transpose(const float* x, int64_t rows, int64_t columns, int64_t x_stride, float* out, int64_t out_stride) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) out[j * out_stride + i] = x[i * x_stride + j];
    for (int64_t i = rows; i < out_stride; ++i) out[j * out_stride + i] = 0;
  }
}

// ---- Attention

// e^x for x <= 0, to 2 units in the last place. Below -87 it is e^-87, which is all but 0.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = std::rint(x * 1.44269504088896341f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n log 2, with log 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t power = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, 4);
  return p * scale;
}

// Queries, keys or values of one head of one sequence: (length, D) float32 with rows `width` apart, 0 past D.
void load_head(const Rows& rows, int64_t first, int64_t length, int64_t head_dim, int64_t width, float* out) {
  for (int64_t i = 0; i < length; ++i) {
    const float* row = load(rows, first + i, out + i * width, head_dim);
    if (row != out + i * width) std::memcpy(out + i * width, row, head_dim * sizeof(float));
    std::fill(out + i * width + head_dim, out + (i + 1) * width, 0.0f);
  }
}

struct Shape {
  int64_t length, head_dim, columns, width;  // columns and width are length and head_dim, padded

  Shape(int64_t length, int64_t head_dim)
      : length(length), head_dim(head_dim), columns(padded(length)), width(padded(head_dim)) {}
};

void store_head(const Rows& rows, int64_t first, const float* x, const Shape& s) {
  for (int64_t i = 0; i < s.length; ++i) {
    const float* row = x + i * s.width;
    if (rows.type == kFloat32)
      std::memcpy(rows.row<float>(first + i), row, s.head_dim * sizeof(float));
    else
      store(rows, first + i, row, s.head_dim);
  }
}

// Calls run(head, first token, shape) for each head of each sequence, in any order.
template <class F>
void for_each_head(const int32_t* cu_seqlens, int64_t batch, int64_t heads, int64_t head_dim, int64_t threads, F run) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < batch * heads; ++task) {
    const int64_t sequence = task / heads, first = cu_seqlens[sequence];
    run(task % heads, first, Shape(cu_seqlens[sequence + 1] - first, head_dim));
  }
}

void attend_head(const Rows& out, float* class_attention, float* highests, float* shares, const Rows& q,
                 const Rows& k, const Rows& v, int64_t first,
                 const Shape& s, float scale) {
  const int64_t n = s.length, area = n * s.width;
  float* memory = scratch(3 * area + s.width * s.columns + n * s.columns);
  float *rows = memory, *values = memory + area, *result = memory + 2 * area;
  float *transposed = memory + 3 * area, *p = transposed + s.width * s.columns;
  load_head(k, first, n, s.head_dim, s.width, rows);
  transpose(rows, n, s.width, s.width, transposed, s.columns);
  load_head(q, first, n, s.head_dim, s.width, rows);
  load_head(v, first, n, s.head_dim, s.width, values);
  multiply(n, s.columns, s.head_dim, {rows, s.width, 1}, transposed, s.columns, p, s.columns);
  for (int64_t i = 0; i < n; ++i) {
    float* row = p + i * s.columns;
    float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
    for (int64_t j = 0; j < n; ++j) highest = std::max(highest, row[j] *= scale);
    for (int64_t j = 0; j < n; ++j) row[j] = exponential(row[j] - highest);
    const float total = sum(n, [&](int64_t j) { return row[j]; });
    const float share = 1 / total;
    for (int64_t j = 0; j < n; ++j) row[j] *= share;
    highests[first + i] = highest;
    shares[first + i] = share;
  }
  if (class_attention != nullptr && n > 0) std::copy(p, p + n, class_attention + first);
  multiply(n, s.width, n, {p, s.columns, 1}, values, s.width, result, s.width);
  store_head(out, first, result, s);
}

void attend_head_backward(const Rows& dq, const Rows& dk, const Rows& dv, const Rows& grad, const float* highests,
                          const float* shares, const Rows& q, const Rows& k, const Rows& v, int64_t first,
                          const Shape& s, float scale) {
  const int64_t n = s.length, area = n * s.width;
  float* memory = scratch(4 * area + s.width * s.columns + 2 * n * s.columns);
  float *queries = memory, *keys = memory + area, *grads = memory + 2 * area, *rows = memory + 3 * area;
  float *transposed = memory + 4 * area, *p = transposed + s.width * s.columns, *ds = p + n * s.columns;
  load_head(q, first, n, s.head_dim, s.width, queries);
  load_head(k, first, n, s.head_dim, s.width, keys);
  load_head(grad, first, n, s.head_dim, s.width, grads);
  load_head(v, first, n, s.head_dim, s.width, rows);
  transpose(rows, n, s.width, s.width, transposed, s.columns);
  multiply(n, s.columns, s.head_dim, {grads, s.width, 1}, transposed, s.columns, ds, s.columns);  // dp = do v^T
  transpose(keys, n, s.width, s.width, transposed, s.columns);
  multiply(n, s.columns, s.head_dim, {queries, s.width, 1}, transposed, s.columns, p, s.columns);
  for (int64_t i = 0; i < n; ++i) {
    float *p_row = p + i * s.columns, *ds_row = ds + i * s.columns;
    const float highest = highests[first + i], share = shares[first + i];
    for (int64_t j = 0; j < n; ++j) p_row[j] *= scale;  // rounded as in the forward pass, whatever their size
    for (int64_t j = 0; j < n; ++j) p_row[j] = exponential(p_row[j] - highest) * share;
    const float delta = sum(n, [&](int64_t j) { return p_row[j] * ds_row[j]; });
    for (int64_t j = 0; j < n; ++j) ds_row[j] = scale * p_row[j] * (ds_row[j] - delta);
  }
  multiply(n, s.width, n, {ds, s.columns, 1}, keys, s.width, rows, s.width);
  store_head(dq, first, rows, s);
  multiply(n, s.width, n, {ds, 1, s.columns}, queries, s.width, rows, s.width);
  store_head(dk, first, rows, s);
  multiply(n, s.width, n, {p, 1, s.columns}, grads, s.width, rows, s.width);
  store_head(dv, first, rows, s);
}

// ---- Patches and pixels

struct Grid {
  int64_t channels, rows, columns, ph, pw;

  int64_t height() const { return rows * ph; }
  int64_t width() const { return columns * pw; }
  int64_t elements() const { return channels * ph * pw; }
};

inline int64_t modulo(int64_t a, int64_t n) { return (a % n + n) % n; }

// Views are (dy, dx, flip) for each image, or one for all of them with a stride of 0; nullptr is the plain view.
struct View {
  int64_t dy = 0, dx = 0;
  bool flip = false;

  View(const int64_t* views, int64_t stride, int64_t image, const Grid& g) {
    if (views == nullptr) return;
    views += image * stride;
    dy = modulo(views[0], g.height());
    dx = modulo(views[1], g.width());
    flip = views[2] != 0;
  }
  // The cell that `view_cells` defines.
  int64_t cell(int64_t position, const Grid& g) const {
    const int64_t row = (position / g.columns + (2 * dy + g.ph) / (2 * g.ph)) % g.rows;
    const int64_t column = (position % g.columns + (2 * dx + g.pw) / (2 * g.pw)) % g.columns;
    return row * g.columns + (flip ? g.columns - 1 - column : column);
  }
};

void gather_patch(const Rows& patches, int64_t t, const float* image, int64_t cell, const View& view, const Grid& g) {
  float* memory = scratch(g.elements() + g.pw);
  float* patch = target(patches, t, memory);
  int32_t* columns = reinterpret_cast<int32_t*>(memory + g.elements());
  for (int64_t x = 0; x < g.pw; ++x) {
    const int64_t seen = cell % g.columns * g.pw + x;
    columns[x] = int32_t(modulo((view.flip ? g.width() - 1 - seen : seen) - view.dx, g.width()));
  }
  for (int64_t channel = 0; channel < g.channels; ++channel)
    for (int64_t y = 0; y < g.ph; ++y) {
      const int64_t row = modulo(cell / g.columns * g.ph + y - view.dy, g.height());
      const float* source = image + (channel * g.height() + row) * g.width();
      float* run = patch + (channel * g.ph + y) * g.pw;
      for (int64_t x = 0; x < g.pw; ++x) run[x] = source[columns[x]];
    }
  store(patches, t, patch, g.elements());
}

// A kept patch: its image, row, column, and a bit for each of the 3 x 3 patches around it that is kept.
struct Site {
  int32_t image, row, column, kept;
};

// One channel of a patch with a pixel around it, (ph + 2, pw + 2). Pixels of stopped patches are 0.
void load_tile(const float* plane, const Site& site, const Grid& g, float* tile) {
  const int64_t width = g.pw + 2;
  for (int64_t y = -1; y <= g.ph; ++y) {
    float* row = tile + (y + 1) * width;
    const int down = y < 0 ? 0 : y < g.ph ? 1 : 2;
    const float* source = plane + (site.row * g.ph + y) * g.width() + site.column * g.pw;
    const bool left = site.kept >> (3 * down) & 1, own = site.kept >> (3 * down + 1) & 1;
    const bool right = site.kept >> (3 * down + 2) & 1;
    row[0] = left ? source[-1] : 0;
    if (own)
      std::memcpy(row + 1, source, g.pw * sizeof(float));
    else
      std::fill(row + 1, row + 1 + g.pw, 0.0f);
    row[1 + g.pw] = right ? source[g.pw] : 0;
  }
}

// 1 where a pixel of the tile is kept, 0 elsewhere.
void load_mask(const Site& site, const Grid& g, float* mask) {
  for (int64_t y = 0; y < g.ph + 2; ++y) {
    const int bits = site.kept >> (y < 1 ? 0 : y <= g.ph ? 3 : 6);
    float* row = mask + y * (g.pw + 2);
    row[0] = float(bits & 1);
    std::fill(row + 1, row + 1 + g.pw, float(bits >> 1 & 1));
    row[1 + g.pw] = float(bits >> 2 & 1);
  }
}

constexpr int64_t kMaxSide = 1024;  // of a patch, in pixels

// Neighbours that total variation compares: right, down, and the two diagonals.
constexpr int kNeighbours = 4, kSums = kNeighbours + 1;

inline void steps(const Grid& g, int64_t* step) {
  const int64_t width = g.pw + 2;
  step[0] = 1, step[1] = width, step[2] = width - 1, step[3] = width + 1;
}

// The sums of squared differences to each neighbour, and of squared pixels.
void squares(const float* image, const Site& site, const Grid& g, double* sums) {
  const int64_t width = g.pw + 2, area = (g.ph + 2) * width;
  float *tile = scratch(2 * area), *mask = tile + area;
  int64_t step[kNeighbours];
  steps(g, step);
  load_mask(site, g, mask);
  Sum parts[kSums];
  for (int64_t channel = 0; channel < g.channels; ++channel) {
    load_tile(image + channel * g.height() * g.width(), site, g, tile);
    for (int n = 0; n < kNeighbours; ++n)
      for (int64_t y = 1; y <= g.ph; ++y) {
        const float *x = tile + y * width + 1, *other = x + step[n], *kept = mask + y * width + 1 + step[n];
        parts[n].add(g.pw, [&](int64_t i) { return (x[i] - other[i]) * (x[i] - other[i]) * kept[i]; });
      }
    for (int64_t y = 1; y <= g.ph; ++y) {
      const float* x = tile + y * width + 1;
      parts[kNeighbours].add(g.pw, [&](int64_t i) { return x[i] * x[i]; });
    }
  }
  for (int n = 0; n < kSums; ++n) sums[n] = parts[n].total();
}

// Adds the gradient of the prior to that of one channel, (ph, pw). `scales` are weight / norm for each sum.
void add_prior_gradient(const float* tile, const float* mask, const float* scales, const Grid& g, float* grad) {
  int64_t step[kNeighbours];
  steps(g, step);
  for (int64_t y = 0; y < g.ph; ++y) {
    const int64_t first = (y + 1) * (g.pw + 2) + 1;
    const float *x = tile + first, *kept = mask + first;
    float* __restrict out = grad + y * g.pw;
    for (int n = 0; n < kNeighbours; ++n) {
      const int64_t d = step[n];
      for (int64_t i = 0; i < g.pw; ++i)
        out[i] += scales[n] * ((x[i] - x[i + d]) * kept[i + d] + (x[i] - x[i - d]) * kept[i - d]);
    }
    for (int64_t i = 0; i < g.pw; ++i) out[i] += scales[kNeighbours] * x[i];
  }
}

// The gradient of the pixels of a patch, where they were seen through a view; 0 where no kept patch was.
void seen_gradient(const Rows& grad, const int32_t* inverse, const Site& site, const View& view, const Grid& g,
                   float* out) {
  const int64_t area = g.ph * g.pw;
  int64_t cells[kMaxSide], within[kMaxSide], places[kMaxSide];  // of each column, and where its gradient is
  for (int64_t x = 0; x < g.pw; ++x) {
    int64_t seen = (site.column * g.pw + x + view.dx) % g.width();
    if (view.flip) seen = g.width() - 1 - seen;
    cells[x] = seen / g.pw;
    within[x] = seen % g.pw;
  }
  for (int64_t y = 0; y < g.ph; ++y) {
    const int64_t seen = (site.row * g.ph + y + view.dy) % g.height(), row = seen % g.ph * g.pw;
    const int32_t* tokens = inverse + seen / g.ph * g.columns;
    for (int64_t x = 0; x < g.pw; ++x) {
      const int64_t token = tokens[cells[x]];
      places[x] = token < 0 ? -1 : token * grad.stride + row + within[x];
    }
    for (int64_t channel = 0; channel < g.channels; ++channel) {
      float* run = out + channel * area + y * g.pw;
      if (grad.type == kFloat32) {
        const float* values = grad.row<float>(0) + channel * area;
        for (int64_t x = 0; x < g.pw; ++x) run[x] = places[x] < 0 ? 0 : values[places[x]];
      } else {
        const uint16_t* values = grad.row<uint16_t>(0) + channel * area;
        for (int64_t x = 0; x < g.pw; ++x) run[x] = places[x] < 0 ? 0 : widen(values[places[x]]);
      }
    }
  }
}

struct Adam {
  float weight1, beta2, weight2, eps;
};

void adam(float* __restrict exp_avg, float* __restrict exp_avg_sq, const float* __restrict grad,
          float* __restrict pixels, int64_t n, const Adam& a, float step_size, float correction, float low,
          float high) {
  for (int64_t i = 0; i < n; ++i) {
    const float m = exp_avg[i] + a.weight1 * (grad[i] - exp_avg[i]);
    const float v = a.beta2 * exp_avg_sq[i] + a.weight2 * grad[i] * grad[i];
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    float x = pixels[i] - step_size * (m / (std::sqrt(v) * correction + a.eps));
    x = x < low ? low : x;  // NaN stays NaN
    pixels[i] = x > high ? high : x;
  }
}

// What is wrong with indices that would lead out of a tensor, for the caller to raise. It holds until the next call.
template <class... Values>
const char* refuse(const char* format, Values... values) {
  thread_local char message[128];
  std::snprintf(message, sizeof message, format, static_cast<long long>(values)...);
  return message;
}

// Cumulative lengths lead from 0 to the number of tokens.
const char* check_lengths(const int32_t* cu_seqlens, int64_t batch, int64_t tokens) {
  if (cu_seqlens[0] != 0 || cu_seqlens[batch] != tokens)
    return refuse("cu_seqlens leads from %lld to %lld, not from 0 to %lld", cu_seqlens[0], cu_seqlens[batch], tokens);
  for (int64_t b = 0; b < batch; ++b)
    if (cu_seqlens[b + 1] < cu_seqlens[b])
      return refuse("cu_seqlens[%lld] is %lld and the next one is %lld", b, cu_seqlens[b], cu_seqlens[b + 1]);
  return nullptr;
}

const char* check_positions(const int32_t* positions, int64_t count, const Grid& g) {
  for (int64_t t = 0; t < count; ++t)
    if (positions[t] < 0 || positions[t] >= g.rows * g.columns)
      return refuse("positions[%lld] is %lld, not in a grid of %lld x %lld", t, positions[t], g.rows, g.columns);
  return nullptr;
}

const char* check_sites(const int32_t* sites, int64_t count, int64_t batch, const Grid& g) {
  const int64_t bounds[] = {batch, g.rows, g.columns};
  for (int64_t i = 0; i < 4 * count; ++i)
    if (i % 4 < 3 && (sites[i] < 0 || sites[i] >= bounds[i % 4]))
      return refuse("sites[%lld, %lld] is %lld, not below %lld", i / 4, i % 4, sites[i], bounds[i % 4]);
  return nullptr;
}

const char* check_inverse(const int32_t* inverse, int64_t cells, int64_t count) {
  for (int64_t i = 0; i < cells; ++i)
    if (inverse[i] >= count) return refuse("inverse holds %lld, and there are %lld patches", inverse[i], count);
  return nullptr;
}

}  // namespace

// Each function returns null, or what is wrong with its indices, and then it has written nothing.
extern "C" {

// A tensor of rows is an address, null where the operator's argument is None, and a `Type`.

const char* residual_norm(void* out, int64_t out_type, void* normed, int64_t normed_type, float* statistics, void* x,
                   int64_t x_type, void* update, int64_t update_type, void* gamma, int64_t gamma_type, void* weight,
                   int64_t weight_type, void* bias, int64_t bias_type, int64_t count, int64_t channels,
                   int64_t x_stride, float eps, int64_t threads) {
  float buffers[3][kMaxChannels];
  const float* scale = widened(rows(gamma, gamma_type, 0), buffers[0], channels, 1);
  const float* factors = widened(rows(weight, weight_type, 0), buffers[1], channels, 1);
  const float* shifts = widened(rows(bias, bias_type, 0), buffers[2], channels, 0);
  const Rows stream = rows(out, out_type, channels), result = rows(normed, normed_type, channels);
  const Rows before = rows(x, x_type, x_stride), added = rows(update, update_type, channels);
#pragma omp parallel for num_threads(threads) if (count * channels > kWorth)
  for (int64_t row = 0; row < count; ++row)
    residual_norm_row(stream, result, statistics, before, added, scale, factors, shifts, eps, row, channels);
  return nullptr;
}

const char* residual_norm_backward(void* grad_x, int64_t grad_x_type, void* grad_update, int64_t grad_update_type,
                            void* grad_stream, int64_t grad_stream_type, void* grad_normed, int64_t grad_normed_type,
                            void* x, int64_t x_type, const float* statistics, void* gamma, int64_t gamma_type,
                            void* weight, int64_t weight_type, int64_t count, int64_t channels, int64_t x_stride,
                            int64_t threads) {
  float buffers[2][kMaxChannels];
  const float* scale = widened(rows(gamma, gamma_type, 0), buffers[0], channels, 1);
  const float* factors = widened(rows(weight, weight_type, 0), buffers[1], channels, 1);
  const Rows dx = rows(grad_x, grad_x_type, channels), du = rows(grad_update, grad_update_type, channels);
  const Rows ds = rows(grad_stream, grad_stream_type, channels), dn = rows(grad_normed, grad_normed_type, channels);
  const Rows stream = rows(x, x_type, x_stride);
#pragma omp parallel for num_threads(threads) if (count * channels > kWorth)
  for (int64_t row = 0; row < count; ++row)
    residual_norm_backward_row(dx, du, ds, dn, stream, statistics, scale, factors, row, channels);
  return nullptr;
}

// qkv (T, 3, H, D) -> out (T, H, D), the highest score and 1 / sum of each softmax row (2, H, T), and the class
// attention (H, T) unless that is null.
const char* attention(void* out, int64_t, float* class_attention, float* statistics, void* qkv, int64_t type,
                      const int32_t* cu_seqlens, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                      float scale, int64_t threads) {
  if (const char* wrong = check_lengths(cu_seqlens, batch, tokens)) return wrong;
  const int64_t width = heads * head_dim;
  for_each_head(cu_seqlens, batch, heads, head_dim, threads, [&](int64_t head, int64_t first, const Shape& shape) {
    const int64_t offset = head * head_dim;
    float *highests = statistics + head * tokens, *shares = highests + heads * tokens;
    auto part = [&](int64_t number) { return rows(qkv, type, 3 * width, number * width + offset); };
    attend_head(rows(out, type, width, offset), class_attention == nullptr ? nullptr : class_attention + head * tokens,
                highests, shares, part(0), part(1), part(2), first, shape, scale);
  });
  return nullptr;
}

const char* attention_backward(void* dqkv, int64_t, void* grad, int64_t, const float* statistics, void* qkv,
                               int64_t type, const int32_t* cu_seqlens, int64_t batch, int64_t tokens, int64_t heads,
                               int64_t head_dim, float scale, int64_t threads) {
  if (const char* wrong = check_lengths(cu_seqlens, batch, tokens)) return wrong;
  const int64_t width = heads * head_dim;
  for_each_head(cu_seqlens, batch, heads, head_dim, threads, [&](int64_t head, int64_t first, const Shape& shape) {
    const int64_t offset = head * head_dim;
    const float *highests = statistics + head * tokens, *shares = highests + heads * tokens;
    auto part = [&](void* data, int64_t number) { return rows(data, type, 3 * width, number * width + offset); };
    attend_head_backward(part(dqkv, 0), part(dqkv, 1), part(dqkv, 2), rows(grad, type, width, offset), highests, shares,
                         part(qkv, 0), part(qkv, 1), part(qkv, 2), first, shape, scale);
  });
  return nullptr;
}

// Images (B, C, H, W) float32 -> patches (T, C ph pw), their cells (T,), and the inverse of these (B, rows, columns).
const char* gather_patches(void* patches, int64_t type, int32_t* cells, int32_t* inverse, const float* images,
                    const int32_t* positions, const int32_t* cu_seqlens, const int64_t* views, int64_t view_stride,
                    int64_t count, int64_t batch, int64_t channels, int64_t rows, int64_t columns, int64_t ph,
                    int64_t pw,
                    int64_t threads) {
  const Grid g{channels, rows, columns, ph, pw};
  if (const char* wrong = check_lengths(cu_seqlens, batch, count)) return wrong;
  if (const char* wrong = check_positions(positions, count, g)) return wrong;
  const Rows out{static_cast<char*>(patches), Type(type), g.elements()};
  std::fill(inverse, inverse + batch * rows * columns, -1);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t image = 0; image < batch; ++image) {
    const View view(views, view_stride, image, g);
    for (int64_t t = cu_seqlens[image]; t < cu_seqlens[image + 1]; ++t) {
      cells[t] = int32_t(view.cell(positions[t], g));
      inverse[image * rows * columns + cells[t]] = int32_t(t);
      gather_patch(out, t, images + image * g.channels * g.height() * g.width(), cells[t], view, g);
    }
  }
  return nullptr;
}

// The squares (T, 5) of each patch, which the priors' norms add up.
const char* prior_squares(double* sums, const float* images, const int32_t* sites, int64_t count, int64_t batch,
                          int64_t channels, int64_t rows, int64_t columns, int64_t ph, int64_t pw, int64_t threads) {
  const Grid g{channels, rows, columns, ph, pw};
  if (const char* wrong = check_sites(sites, count, batch, g)) return wrong;
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < count; ++t) {
    Site site;
    std::memcpy(&site, sites + 4 * t, sizeof site);
    squares(images + site.image * g.channels * g.height() * g.width(), site, g, sums + kSums * t);
  }
  return nullptr;
}

// `scales` (5,) or (B, 5) are weight / norm of each sum, `corrections` (2,) or (B, 2) the step size and the factor of
// sqrt(v) in Adam; strides of 0 share them. `scales` is null without a prior. `grad` has the rows of the `seen` patches.
const char* pixel_step(float* next_images, float* exp_avg, float* exp_avg_sq, const float* images, void* grad,
                       int64_t type,
                const float* pixel_grad, const int32_t* sites, const float* lowest, const float* highest,
                const int32_t* inverse, const int64_t* views, int64_t view_stride, const float* scales,
                int64_t scales_stride, const float* corrections, int64_t corrections_stride, float weight1,
                float beta2, float weight2, float eps, int64_t seen, int64_t count, int64_t batch, int64_t channels,
                int64_t rows, int64_t columns, int64_t ph, int64_t pw, int64_t threads) {
  const Grid g{channels, rows, columns, ph, pw};
  if (const char* wrong = check_sites(sites, count, batch, g)) return wrong;
  if (views != nullptr)
    if (const char* wrong = check_inverse(inverse, batch * rows * columns, seen)) return wrong;
  const Rows grads{static_cast<char*>(grad), Type(type), g.elements()};
  const int64_t plane = g.height() * g.width(), area = ph * pw, bordered = (ph + 2) * (pw + 2);
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < count; ++t) {
    Site site;
    std::memcpy(&site, sites + 4 * t, sizeof site);
    float *total = scratch(g.elements() + area + 2 * bordered), *pixels = total + g.elements();
    float *tile = pixels + area, *mask = tile + bordered;
    if (views == nullptr) {
      const float* own = load(grads, t, total, g.elements());
      if (own != total) std::memcpy(total, own, g.elements() * sizeof(float));
    } else {
      seen_gradient(grads, inverse + site.image * rows * columns, site, View(views, view_stride, site.image, g), g,
                    total);
    }
    if (pixel_grad != nullptr)
      for (int64_t i = 0; i < g.elements(); ++i) total[i] += pixel_grad[t * g.elements() + i];
    load_mask(site, g, mask);
    const float* correction = corrections + site.image * corrections_stride;
    for (int64_t channel = 0; channel < channels; ++channel) {
      const int64_t offset = (site.image * channels + channel) * plane + site.row * ph * g.width() + site.column * pw;
      float* channel_grad = total + channel * area;
      load_tile(images + (site.image * channels + channel) * plane, site, g, tile);
      if (scales != nullptr)
        add_prior_gradient(tile, mask, scales + site.image * scales_stride, g, channel_grad);
      for (int64_t y = 0; y < ph; ++y)
        std::memcpy(pixels + y * pw, tile + (y + 1) * (pw + 2) + 1, pw * sizeof(float));
      const int64_t element = t * g.elements() + channel * area;
      adam(exp_avg + element, exp_avg_sq + element, channel_grad, pixels, area, {weight1, beta2, weight2, eps},
           correction[0], correction[1], lowest[channel], highest[channel]);
      for (int64_t y = 0; y < ph; ++y)
        std::memcpy(next_images + offset + y * g.width(), pixels + y * pw, pw * sizeof(float));
    }
  }
  return nullptr;
}

}  // extern "C"
