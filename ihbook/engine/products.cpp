// Products of the small matrices of a training step. They fit a core's first caches, so that a tile that stays in registers is all the
// blocking that they need.

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8, VECTORS = 2;  // of 32 registers, 16 hold sums
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6, VECTORS = 2;  // of 16 registers, 12 hold sums; most widths of a step are multiples of 16, not 24
#else
constexpr int LANES = 4, ROWS = 8, VECTORS = 2;
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

struct Matrix {
  float* at;
  int64_t down, right;  // strides: to the next row, to the next column
};

// c[R, V * LANES] = a[R, K] @ b[K, V * LANES]; the rows of b and c are contiguous.
template <int R, int V>
void tile(Matrix a, Matrix b, Matrix c, int64_t K) {
  Vector sum[R][V] = {};
  for (int64_t k = 0; k < K; k++) {
    const Vector* row = reinterpret_cast<const Vector*>(b.at + k * b.down);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sum[r][v] += row[v] * a.at[r * a.down + k * a.right];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) reinterpret_cast<Vector*>(c.at + r * c.down)[v] = sum[r][v];
}

// c[M, V * LANES] = a[M, K] @ b[K, V * LANES], R rows at a time, then half as many.
template <int R, int V>
void panel(Matrix a, Matrix b, Matrix c, int64_t M, int64_t K) {
  for (; M >= R; M -= R) {
    tile<R, V>(a, b, c, K);
    a.at += R * a.down;
    c.at += R * c.down;
  }
  if constexpr (R > 1)
    if (M) panel<R / 2, V>(a, b, c, M, K);
}

// c[M, N] = a[M, K] @ b[K, N]. Columns of b that are not contiguous, or too few for a vector, are copied first.
void product(Matrix a, Matrix b, Matrix c, int64_t M, int64_t K, int64_t N) {
  thread_local std::vector<float> copy, result;
  while (N) {
    const int64_t width = N >= VECTORS * LANES ? VECTORS * LANES : LANES, n = std::min(N, width);
    Matrix from = b, to = c;
    if (b.right != 1 || n < width) {
      copy.resize(K * width);
      from = {copy.data(), width, 1};
      for (int64_t k = 0; k < K; k++) {
        for (int64_t j = 0; j < n; j++) from.at[k * width + j] = b.at[k * b.down + j * b.right];
        for (int64_t j = n; j < width; j++) from.at[k * width + j] = 0;
      }
    }
    if (n < width) {
      result.resize(M * width);
      to = {result.data(), width, 1};
    }
    if (width > LANES)
      panel<ROWS, VECTORS>(a, from, to, M, K);
    else
      panel<ROWS, 1>(a, from, to, M, K);
    if (n < width)
      for (int64_t m = 0; m < M; m++) std::copy_n(to.at + m * width, n, c.at + m * c.down);
    b.at += n * b.right;
    c.at += n;
    N -= n;
  }
}

}  // namespace

// `out` [..., M, N] is a new tensor with the product of `a` [..., M, K] and `b` [..., K, N], float32 with any strides.
extern "C" AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cpu_matrix_product(AtenTensorHandle a, AtenTensorHandle b,
                                                                          AtenTensorHandle* out) {
  int64_t axes, *size_a, *size_b, *stride_a, *stride_b;
  void *at_a, *at_b, *at_out;
  if (aoti_torch_get_dim(a, &axes) || aoti_torch_get_sizes(a, &size_a) || aoti_torch_get_sizes(b, &size_b) ||
      aoti_torch_get_strides(a, &stride_a) || aoti_torch_get_strides(b, &stride_b) || aoti_torch_get_data_ptr(a, &at_a) ||
      aoti_torch_get_data_ptr(b, &at_b))
    return AOTI_TORCH_FAILURE;
  const int64_t i = axes - 2, n_products = i ? size_a[0] : 1, M = size_a[i], K = size_a[i + 1], N = size_b[i + 1];
  const int64_t size[] = {n_products, M, N}, stride[] = {M * N, N, 1};
  if (aoti_torch_empty_strided(axes, size + 1 - i, stride + 1 - i, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, out) ||
      aoti_torch_get_data_ptr(*out, &at_out))
    return AOTI_TORCH_FAILURE;
  for (int64_t p = 0; p < n_products; p++)
    product({static_cast<float*>(at_a) + (i ? p * stride_a[0] : 0), stride_a[i], stride_a[i + 1]},
            {static_cast<float*>(at_b) + (i ? p * stride_b[0] : 0), stride_b[i], stride_b[i + 1]},
            {static_cast<float*>(at_out) + p * M * N, N, 1}, M, K, N);
  return AOTI_TORCH_SUCCESS;
}
