// Llama-shaped layers for few rows on an x86 CPU: each result row is computed in one order of operations, whatever rows
// stand beside it, so that a position has the same bits in a prefill, a plain step and a verification.
//
// Knows packed weights, activations of one pass and a key/value cache by addresses; allocates nothing, checks nothing:
// its caller (native/path.py) does. Plain C interface, no libtorch: it compiles in seconds. Threads are OpenMP's, of
// the runtime that torch has loaded already.
//
// M rows, K inputs and N outputs of a product, L lanes, D hidden, H query heads, G key/value heads, d head size.
// Half precision means bfloat16: stored as its 16 bits, computed in float32.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "these kernels need AVX2, FMA and F16C"
#endif

namespace {

constexpr int L = 16;      // outputs that stand side by side in a packed weight
constexpr int MAX_HEAD_DIM = 512;
constexpr int MAX_HEADS = 4;  // that are attended together
constexpr int BLOCK = 32;  // inputs that share a scale in a quantised weight

// ---- Sixteen float32 lanes ------------------------------------------------------------------------------------------

#ifdef __AVX512F__
typedef __m512 Lanes;
typedef __m512i Words;
constexpr int MAX_SUMS = 24;  // accumulators that stay in registers beside weights and inputs
inline Lanes zeros() { return _mm512_setzero_ps(); }
inline Lanes all(float x) { return _mm512_set1_ps(x); }
inline Lanes load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Lanes x) { _mm512_storeu_ps(p, x); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes max(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes min(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
// y where x is not below the limit (NaN is not), else 0.
inline Lanes above(Lanes x, Lanes limit, Lanes y) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), y); }
inline float sum(Lanes x) { return _mm512_reduce_add_ps(x); }
inline Words words(const void* p) { return _mm512_loadu_si512(p); }
inline Lanes rounded(Lanes x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Lanes times_power_of_two(Lanes x, Lanes n) { return _mm512_scalef_ps(x, n); }
inline Lanes divide(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
inline float highest(Lanes x) { return _mm512_reduce_max_ps(x); }
inline Lanes low_half(Words w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
inline Lanes high_half(Words w) { return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(0xffff0000))); }
template <int SHIFT> inline Lanes nibble(Words w) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(w, SHIFT), _mm512_set1_epi32(15)));
}
inline Lanes widened(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline Lanes from_float16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
#else
struct Lanes { __m256 a, b; };
struct Words { __m256i a, b; };
constexpr int MAX_SUMS = 4;
#define BOTH(expression_a, expression_b) Lanes{expression_a, expression_b}
inline Lanes zeros() { return BOTH(_mm256_setzero_ps(), _mm256_setzero_ps()); }
inline Lanes all(float x) { return BOTH(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
inline Lanes load(const float* p) { return BOTH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
inline void store(float* p, Lanes x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return BOTH(_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)); }
inline Lanes add(Lanes a, Lanes b) { return BOTH(_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)); }
inline Lanes mul(Lanes a, Lanes b) { return BOTH(_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)); }
inline Lanes max(Lanes a, Lanes b) { return BOTH(_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)); }
inline Lanes min(Lanes a, Lanes b) { return BOTH(_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)); }
inline __m256 above8(__m256 x, __m256 limit, __m256 y) { return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ), y); }
inline Lanes above(Lanes x, Lanes limit, Lanes y) { return BOTH(above8(x.a, limit.a, y.a), above8(x.b, limit.b, y.b)); }
inline float sum(Lanes x) {
  __m256 y = _mm256_add_ps(x.a, x.b);
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_shuffle_ps(z, z, 1)));
}
inline Words words(const void* p) {
  return Words{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline Lanes rounded(Lanes x) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return BOTH(_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest));
}
inline __m256 scaled8(__m256 x, __m256 n) {  // n a whole number in -126..127
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_add_ps(n, _mm256_set1_ps(127))), 23)));
}
inline Lanes times_power_of_two(Lanes x, Lanes n) { return BOTH(scaled8(x.a, n.a), scaled8(x.b, n.b)); }
inline Lanes divide(Lanes a, Lanes b) { return BOTH(_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)); }
inline float highest(Lanes x) {
  float y[L], z = -INFINITY;
  store(y, x);
  for (float v : y) z = std::max(z, v);
  return z;
}
inline Lanes low_half(Words w) {
  return BOTH(_mm256_castsi256_ps(_mm256_slli_epi32(w.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(w.b, 16)));
}
inline Lanes high_half(Words w) {
  const __m256i mask = _mm256_set1_epi32(0xffff0000);
  return BOTH(_mm256_castsi256_ps(_mm256_and_si256(w.a, mask)), _mm256_castsi256_ps(_mm256_and_si256(w.b, mask)));
}
template <int SHIFT> inline __m256 nibble8(__m256i w) {
  return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w, SHIFT), _mm256_set1_epi32(15)));
}
template <int SHIFT> inline Lanes nibble(Words w) { return BOTH(nibble8<SHIFT>(w.a), nibble8<SHIFT>(w.b)); }
inline __m256 widened8(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Lanes widened(const uint16_t* p) { return BOTH(widened8(p), widened8(p + 8)); }
inline Lanes from_float16(const uint16_t* p) {
  return BOTH(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1)));
}
#endif

inline Lanes load(const uint16_t* p) { return widened(p); }

inline float to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
// To the nearest bfloat16, ties to even; NaN stays NaN.
#ifdef __AVX512BF16__
inline void store(uint16_t* p, Lanes x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
#else
inline void store(uint16_t* p, Lanes x) {
  uint32_t bits[L];
  store((float*)bits, x);
  for (int i = 0; i < L; i++) {
    const bool is_nan = (bits[i] & 0x7fffffff) > 0x7f800000;
    p[i] = is_nan ? 0x7fc0 : (bits[i] + 0x7fff + ((bits[i] >> 16) & 1)) >> 16;
  }
}
#endif

// e^x for x <= 0 or so: relative error below 2e-7, 0 below -87, NaN of NaN. Cephes' polynomial.
inline Lanes exponential(Lanes x) {
  const Lanes clipped = max(all(-87.3f), min(all(88.0f), x));  // of NaN the second, so: x
  const Lanes n = rounded(mul(clipped, all(1.44269504f)));
  Lanes r = fma(n, all(-0.693359375f), clipped);
  r = fma(n, all(2.12194440e-4f), r);
  Lanes y = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = fma(y, r, all(c));
  y = add(fma(y, mul(r, r), r), all(1.0f));
  return above(x, all(-87.0f), times_power_of_two(y, n));
}

// ---- Products -------------------------------------------------------------------------------------------------------

// A packed weight holds its outputs in panels of L. Kind by kind, one panel is
//   FLOAT32   [K][L] float32
//   BFLOAT16  [K/2][L][2] bfloat16: two inputs side by side
//   INT4      [K/32] of { scale [L] float16, low [L] float16, [4][L][2][4] nibbles }: weight = scale * nibble + low;
//             nibble t of input parity p in group c belongs to input 8 c + 2 t + p
//   INT8      [K/32] of { scale [L] float16, [16][L][2] int8 }
enum Kind : int32_t { FLOAT32, BFLOAT16, INT4, INT8 };
constexpr size_t INT4_BYTES = 4 * L + BLOCK * L / 2, INT8_BYTES = 2 * L + BLOCK * L;  // of a block in a panel

struct Product {
  int32_t kind, n, k, padding;
  const char* weight;
  const float* bias;  // [N] or null
};

inline size_t bytes_of_panel(const Product& p) {
  switch (p.kind) {
    case FLOAT32: return size_t(p.k) * L * 4;
    case BFLOAT16: return size_t(p.k) * L * 2;
    case INT4: return size_t(p.k / BLOCK) * INT4_BYTES;
    default: return size_t(p.k / BLOCK) * INT8_BYTES;
  }
}

// Two inputs' weights for L outputs, ready to be multiplied with two bfloat16 inputs.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
typedef __m512i Pair;
struct Input {
  __m512bh value;
  explicit Input(uint32_t two) : value((__m512bh)_mm512_set1_epi32(two)) {}
};
inline Lanes multiply_add(Lanes c, const Input& x, Pair w) { return _mm512_dpbf16_ps(c, x.value, (__m512bh)w); }
inline Pair pair_of(Words w) { return w; }
inline Pair pair_of(Lanes even, Lanes odd) {  // of numbers that bfloat16 holds
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd));
}
// The sixteen nibbles as bfloat16, twice: a permutation looks at five bits, the fifth is a neighbour's.
inline Words nibble_table() {
  static const uint16_t once[16] = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                    0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
  return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)once));
}
template <int T> inline Pair nibbles(Words w, Words table) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4 * T), table);
}
#else
struct Pair { Lanes even, odd; };
struct Input {
  Lanes even, odd;
  explicit Input(uint32_t two) : even(all(to_float(two & 0xffff))), odd(all(to_float(two >> 16))) {}
};
inline Lanes multiply_add(Lanes c, const Input& x, const Pair& w) { return fma(w.odd, x.odd, fma(w.even, x.even, c)); }
inline Pair pair_of(Words w) { return Pair{low_half(w), high_half(w)}; }
inline Pair pair_of(Lanes even, Lanes odd) { return Pair{even, odd}; }
inline int nibble_table() { return 0; }
template <int T> inline Pair nibbles(Words w, int) { return Pair{nibble<4 * T>(w), nibble<16 + 4 * T>(w)}; }
#endif

#ifdef __AVX512F__
inline Pair int8_pair(const char* p) {
#ifdef __AVX512BF16__
  auto lanes = [](const char* q) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)q))); };
  return (__m512i)_mm512_cvtne2ps_pbh(lanes(p + L), lanes(p));
#else
  __m512i both = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
  Lanes even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(both, 16), 16));
  return pair_of(even, _mm512_cvtepi32_ps(_mm512_srai_epi32(both, 16)));
#endif
}
#else
inline Pair int8_pair(const char* p) {
  float even[L], odd[L];
  for (int i = 0; i < L; i++) even[i] = int8_t(p[2 * i]), odd[i] = int8_t(p[2 * i + 1]);
  return pair_of(load(even), load(odd));
}
#endif

// Inputs of R rows, as the weight's kind wants them.
struct Inputs {
  const void* x;       // [M, K] float32 for FLOAT32, else bfloat16
  const float* sums;   // [M, K/32] of an INT4 product: the sum of each block's inputs
};

template <int KIND, int NB, int R>
inline void tile(const Product& p, const char* panel, const char* ahead, size_t bytes, const Inputs& in, int m0, Lanes (&y)[NB][R]) {
  for (int b = 0; b < NB; b++)
    for (int r = 0; r < R; r++) y[b][r] = zeros();
  if constexpr (KIND == FLOAT32) {
    const float* x = (const float*)in.x + size_t(m0) * p.k;
    for (int k = 0; k < p.k; k++) {
      Lanes w[NB];
      for (int b = 0; b < NB; b++) w[b] = load((const float*)(panel + b * bytes) + size_t(k) * L);
      for (int b = 0; b < NB; b++) _mm_prefetch(ahead + b * bytes + size_t(k) / 2 * 64, _MM_HINT_T0);
      for (int r = 0; r < R; r++) {
        Lanes input = all(x[size_t(r) * p.k + k]);
        for (int b = 0; b < NB; b++) y[b][r] = fma(w[b], input, y[b][r]);
      }
    }
  } else if constexpr (KIND == BFLOAT16) {
    const uint32_t* x = (const uint32_t*)in.x + size_t(m0) * (p.k / 2);
    for (int k = 0; k < p.k / 2; k++) {
      Pair w[NB];
      for (int b = 0; b < NB; b++) w[b] = pair_of(words(panel + b * bytes + size_t(k) * L * 4));
      for (int b = 0; b < NB; b++) _mm_prefetch(ahead + b * bytes + size_t(k) / 2 * 64, _MM_HINT_T0);
      for (int r = 0; r < R; r++) {
        Input input(x[size_t(r) * (p.k / 2) + k]);
        for (int b = 0; b < NB; b++) y[b][r] = multiply_add(y[b][r], input, w[b]);
      }
    }
  } else {
    const uint32_t* x = (const uint32_t*)in.x + size_t(m0) * (p.k / 2);
    const int blocks = p.k / BLOCK;
    const auto table = nibble_table();
    constexpr size_t step = KIND == INT4 ? INT4_BYTES : INT8_BYTES;
    for (int i = 0; i < blocks; i++) {
      const char* q = panel + i * step;
      for (int b = 0; b < NB; b++)
        for (size_t at = 0; at < step; at += 64) _mm_prefetch(q + (NB + b) * bytes + at, _MM_HINT_T0);
      const uint32_t* x_block = x + i * (BLOCK / 2);
      Lanes block[NB][R];
      for (int b = 0; b < NB; b++)
        for (int r = 0; r < R; r++) block[b][r] = zeros();
      auto add_pair = [&](int t, const Pair (&w)[NB]) {
        for (int r = 0; r < R; r++) {
          const Input input(x_block[size_t(r) * (p.k / 2) + t]);
          for (int b = 0; b < NB; b++) block[b][r] = multiply_add(block[b][r], input, w[b]);
        }
      };
      if constexpr (KIND == INT4) {
        for (int c = 0; c < 4; c++) {
          Words w[NB];
          for (int b = 0; b < NB; b++) w[b] = words(q + b * bytes + 4 * L + c * 64);
          auto add_nibbles = [&](auto t) {
            Pair pairs[NB];
            for (int b = 0; b < NB; b++) pairs[b] = nibbles<t.value>(w[b], table);
            add_pair(4 * c + t.value, pairs);
          };
          add_nibbles(std::integral_constant<int, 0>());
          add_nibbles(std::integral_constant<int, 1>());
          add_nibbles(std::integral_constant<int, 2>());
          add_nibbles(std::integral_constant<int, 3>());
        }
      } else {
        for (int t = 0; t < BLOCK / 2; t++) {
          Pair pairs[NB];
          for (int b = 0; b < NB; b++) pairs[b] = int8_pair(q + b * bytes + 2 * L + t * 2 * L);
          add_pair(t, pairs);
        }
      }
      for (int b = 0; b < NB; b++) {
        const uint16_t* scales = (const uint16_t*)(q + b * bytes);
        const Lanes scale = from_float16(scales);
        if constexpr (KIND == INT4) {
          const Lanes low = from_float16(scales + L);
          for (int r = 0; r < R; r++) y[b][r] = fma(low, all(in.sums[size_t(m0 + r) * blocks + i]), y[b][r]);
        }
        for (int r = 0; r < R; r++) y[b][r] = fma(scale, block[b][r], y[b][r]);
      }
    }
  }
}

template <int KIND, int NB, int R>
void panels(const Product& p, int first, int t, const Inputs& in, int m0, float* y, bool accumulate) {
  const size_t bytes = bytes_of_panel(p);
  Lanes sums[NB][R];
  const char* panel = p.weight + first * bytes;
  tile<KIND, NB, R>(p, panel, panel + NB * bytes + (t & 1) * bytes / 2, bytes, in, m0, sums);
  for (int b = 0; b < NB; b++) {
    const int n0 = (first + b) * L, count = std::min(L, p.n - n0);
    for (int r = 0; r < R; r++) {
      float* out = y + size_t(m0 + r) * p.n + n0;
      if (count == L) {
        Lanes value = sums[b][r];
        if (p.bias) value = add(value, load(p.bias + n0));
        store(out, accumulate ? add(load(out), value) : value);
      } else {
        float values[L];
        store(values, sums[b][r]);
        for (int i = 0; i < count; i++) {
          float value = values[i];
          if (p.bias) value += p.bias[n0 + i];
          out[i] = accumulate ? out[i] + value : value;
        }
      }
    }
  }
}

template <int KIND, int NB, int R>
void rows_of(const Product& p, int first, int t, const Inputs& in, int m0, int rows, float* y, bool accumulate) {
  if constexpr (R > 1)
    if (rows < R) return rows_of<KIND, NB, R - 1>(p, first, t, in, m0, rows, y, accumulate);
  panels<KIND, NB, R>(p, first, t, in, m0, y, accumulate);
}

// NB panels for all rows, in tiles of at most R: whatever the tile, a sum runs over the inputs in their order.
template <int KIND, int NB, int R>
void few_panels(const Product& p, int first, const Inputs& in, int M, float* y, bool accumulate) {
  const int tiles = (M + R - 1) / R;
  for (int t = 0, m0 = 0; t < tiles; t++) {  // as even as can be
    const int rows = (M - m0) / (tiles - t);
    rows_of<KIND, NB, R>(p, first, t, in, m0, rows, y, accumulate);
    m0 += rows;
  }
}

template <int KIND>
void share(const Product& p, const Inputs& in, int M, float* y, bool accumulate, int thread, int threads) {
  const int count = (p.n + L - 1) / L;
  int first = int(int64_t(count) * thread / threads);
  const int end = int(int64_t(count) * (thread + 1) / threads);
  // One or two rows of a quantised weight wait for memory, which is read fastest from end to end.
  const bool by_two = KIND < INT4 || M > 2;
  while (first < end) {
    if constexpr (KIND < INT4) {
      if (M <= MAX_SUMS / 6 && end - first >= 4) {
        few_panels<KIND, 4, std::max(1, MAX_SUMS / 6)>(p, first, in, M, y, accumulate), first += 4;
        continue;
      }
    }
    if (by_two && end - first >= 2) {
      few_panels<KIND, 2, MAX_SUMS / 2>(p, first, in, M, y, accumulate), first += 2;
    } else {
      few_panels<KIND, 1, MAX_SUMS / 2>(p, first, in, M, y, accumulate), first += 1;
    }
  }
}

// One thread's share of y = x W^T + b, or of y += that.
void multiply(const Product& p, const Inputs& in, int M, float* y, bool accumulate, int thread, int threads) {
  switch (p.kind) {
    case FLOAT32: return share<FLOAT32>(p, in, M, y, accumulate, thread, threads);
    case BFLOAT16: return share<BFLOAT16>(p, in, M, y, accumulate, thread, threads);
    case INT4: return share<INT4>(p, in, M, y, accumulate, thread, threads);
    default: return share<INT8>(p, in, M, y, accumulate, thread, threads);
  }
}

void sum_blocks(const uint16_t* x, int k, float* sums) {
  for (int i = 0; i < k / BLOCK; i++) sums[i] = sum(add(load(x + i * BLOCK), load(x + i * BLOCK + L)));
}

// ---- A layer's other parts: X is float32 or bfloat16, what the products read ----------------------------------------

template <class X>
void finish_row(X* out, int k, float* sums) {  // what an INT4 product wants beside its inputs
  if constexpr (sizeof(X) == 2)
    if (sums) sum_blocks(out, k, sums);
}

template <class X> void rms_norm(const float* x, const float* gain, float eps, int width, X* out) {
  Lanes squares = zeros();
  for (int i = 0; i < width; i += L) squares = fma(load(x + i), load(x + i), squares);
  const Lanes scale = all(1.0f / std::sqrt(sum(squares) / width + eps));
  for (int i = 0; i < width; i += L) store(out + i, mul(mul(load(x + i), scale), load(gain + i)));
}

struct Layer {
  Product qkv, o, gate_up, down;
  const float *input_gain, *post_gain, *q_gain, *k_gain;  // the last two null without query/key norms
  float input_eps, post_eps, qk_eps;
  int32_t window;  // 0: sees everything before it
};

struct Pass {
  int32_t rows, width, heads, kv_heads, head_dim, capacity, threads;
  float scale;
  const int64_t *cache_rows, *positions, *slots;  // [M]: the cache row, position in the text, and column to write
  // [M], null without a draft tree: bit i of `ancestors` is set where node i of the row's tree, whose column is
  // `lengths` + i, is the query's node or above it.
  const int64_t *ancestors, *lengths;
  const float *cos, *sin;                 // [S, d], the sine signed as rotate_half wants it
  char *inputs, *mixed;                   // [M, widest] of X; [M, widest of qkv and gate_up] float32
  float *sums, *scores;                   // [M, widest / 32]; [threads, 4, capacity + 16]
};

void rotate(float* x, int d, const float* cos, const float* sin) {
  for (int i = 0, j = d / 2; i < d / 2; i += L, j += L) {
    const Lanes a = load(x + i), b = load(x + j);
    store(x + i, fma(b, load(sin + i), mul(a, load(cos + i))));
    store(x + j, fma(a, load(sin + j), mul(b, load(cos + j))));
  }
}

// Queries and keys of one row: normalised, rotated, keys and values stored.
template <class X> void settle(const Layer& layer, const Pass& pass, int m, X* keys, X* values) {
  const int d = pass.head_dim, H = pass.heads, G = pass.kv_heads;
  float* row = (float*)pass.mixed + size_t(m) * (H + 2 * G) * d;
  const int64_t position = pass.positions[m], slot = pass.slots[m];
  for (int h = 0; h < H + G; h++) {
    if (layer.q_gain) rms_norm(row + h * d, h < H ? layer.q_gain : layer.k_gain, layer.qk_eps, d, row + h * d);
    rotate(row + h * d, d, pass.cos + position * d, pass.sin + position * d);
  }
  for (int g = 0; g < G; g++) {
    const size_t at = ((size_t(pass.cache_rows[m]) * G + g) * pass.capacity + slot) * d;
    for (int i = 0; i < d; i += L) {
      store(keys + at + i, load(row + (H + g) * d + i));
      store(values + at + i, load(row + (H + G + g) * d + i));
    }
  }
}

// The sums of L times L lanes, each in the same order of additions.
inline Lanes sums_of(const Lanes (&x)[L]) {
#ifdef __AVX512F__
  Lanes a[8], b[4], c[2];
  for (int i = 0; i < 8; i++) a[i] = add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d p = _mm512_castps_pd(a[2 * i]), q = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
  for (int i = 0; i < 2; i++) c[i] = add(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return add(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
#else
  float y[L];
  for (int i = 0; i < L; i++) y[i] = sum(x[i]);
  return load(y);
#endif
}

// What a query sees, in the order of the text: the columns of its row, in which the nodes of a draft tree lie apart.
struct Sight {
  int start, count, committed;  // the first column, how many are seen, and where those of a tree begin
  int first;                    // columns from `start` to here stand before the window
  uint8_t path[64];             // the nodes seen, from the root on

  Sight(const Pass& pass, int m, int window) {
    const int position = int(pass.positions[m]);
    first = window ? std::max(0, position - window + 1) : 0;
    start = first / L * L;
    count = position - start + 1;
    committed = pass.ancestors ? int(pass.lengths[m]) : position + 1;
    if (pass.ancestors) {
      int n = 0;
      for (uint64_t left = pass.ancestors[m]; left; left &= left - 1) path[n++] = __builtin_ctzll(left);
    }
  }
  size_t column(int i) const {
    const int at = start + i;
    return at < committed ? at : committed + path[at - committed];
  }
};

// scores [L] = query times each of L keys from the s-th on; behind the last one it is repeated.
template <int PARTS, class X> inline Lanes scores_of(const X* q, const X* keys, const Sight& sight, int s, int d) {
  Lanes products[L];
#ifdef __AVX512BF16__
  if constexpr (sizeof(X) == 2 && PARTS > 0) {  // d = 32 PARTS: the query stays in registers
    __m512bh query[PARTS];
    for (int j = 0; j < PARTS; j++) query[j] = (__m512bh)words(q + j * 2 * L);
    for (int i = 0; i < L; i++) {
      const X* k = keys + sight.column(std::min(s + i, sight.count - 1)) * d;
      products[i] = zeros();
      for (int j = 0; j < PARTS; j++) products[i] = _mm512_dpbf16_ps(products[i], query[j], (__m512bh)words(k + j * 2 * L));
    }
    return sums_of(products);
  }
#endif
  for (int i = 0; i < L; i++) {
    const X* k = keys + sight.column(std::min(s + i, sight.count - 1)) * d;
    products[i] = zeros();
    for (int j = 0; j < d; j += L) products[i] = fma(load(q + j), load(k + j), products[i]);
  }
  return sums_of(products);
}

// out [HEADS][32 PARTS of d] = weighted sums of the values, in the order of the text, for heads that share them.
template <int HEADS, int PARTS, class X>
inline void weighted(const float* weights, size_t stride, const X* values, const Sight& sight, int d, const float* scale, X* out) {
  const int count = sight.count;
  Lanes mean[HEADS][2 * PARTS];
  for (auto& head : mean)
    for (Lanes& lanes : head) lanes = zeros();
#ifdef __AVX512BF16__
  if constexpr (sizeof(X) == 2) {  // two slots at once: their weights as bfloat16 side by side, so are their values
    for (int s = 0; s < count; s += 2) {
      const X *v = values + sight.column(s) * d, *next = values + sight.column(std::min(s + 1, count - 1)) * d;
      __m512bh weight[HEADS];
      for (int h = 0; h < HEADS; h++) {
        const __m128 both = _mm_castpd_ps(_mm_load_sd((const double*)(weights + h * stride + s)));
        weight[h] = (__m512bh)_mm512_broadcastd_epi32((__m128i)_mm_cvtneps_pbh(both));
      }
      for (int j = 0; j < PARTS; j++) {
        const __m512i one = words(v + j * 2 * L), other = words(next + j * 2 * L);
        const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(one, other), high = (__m512bh)_mm512_unpackhi_epi16(one, other);
        for (int h = 0; h < HEADS; h++) {
          mean[h][2 * j] = _mm512_dpbf16_ps(mean[h][2 * j], weight[h], low);
          mean[h][2 * j + 1] = _mm512_dpbf16_ps(mean[h][2 * j + 1], weight[h], high);
        }
      }
    }
    for (int h = 0; h < HEADS; h++)
      for (int j = 0; j < PARTS; j++) {  // back in order: unpacking works on quarters of a register
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        const Lanes low = mean[h][2 * j], high = mean[h][2 * j + 1];
        mean[h][2 * j] = _mm512_permutex2var_ps(low, first, high);
        mean[h][2 * j + 1] = _mm512_permutex2var_ps(low, second, high);
      }
  } else
#endif
    for (int s = 0; s < count; s++)
      for (int h = 0; h < HEADS; h++) {
        const Lanes weight = all(weights[h * stride + s]);
        for (int j = 0; j < 2 * PARTS; j++)
          mean[h][j] = fma(weight, load(values + sight.column(s) * d + j * L), mean[h][j]);
      }
  for (int h = 0; h < HEADS; h++)
    for (int j = 0; j < 2 * PARTS; j++) store(out + h * d + j * L, mul(mean[h][j], all(scale[h])));
}

// Query heads h .. h + HEADS - 1 of one row, which share a key/value head, over all that they may see: in the order of
// the text, in blocks that begin at multiples of L. scores: HEADS rows of `stride`.
template <int HEADS, class X>
void attend(const Layer& layer, const Pass& pass, int m, int h, const X* keys, const X* values, float* scores, size_t stride, X* out) {
  const int d = pass.head_dim, H = pass.heads, G = pass.kv_heads;
  const Sight sight(pass, m, layer.window);
  const int count = sight.count;
  const size_t base = (size_t(pass.cache_rows[m]) * G + h / (H / G)) * pass.capacity * d;
  const float* row = (const float*)pass.mixed + (size_t(m) * (H + 2 * G) + h) * d;
  X q[HEADS * MAX_HEAD_DIM];
  for (int i = 0; i < HEADS * d; i += L) store(q + i, load(row + i));
  Lanes top[HEADS];
  for (Lanes& lanes : top) lanes = all(-INFINITY);
  for (int s = 0; s < count; s += L) {
    for (int i = 0; i < HEADS; i++) {
      Lanes found = d == 64    ? scores_of<2>(q + i * d, keys + base, sight, s, d)
                    : d == 128 ? scores_of<4>(q + i * d, keys + base, sight, s, d)
                               : scores_of<0>(q + i * d, keys + base, sight, s, d);
      found = mul(found, all(pass.scale));
      if (s + L > count || sight.start + s < sight.first) {  // what lies past the query, or before its window
        float some[L];
        store(some, found);
        for (int n = 0; n < L; n++)
          if (s + n >= count || sight.start + s + n < sight.first) some[n] = -INFINITY;
        found = load(some);
      }
      store(scores + i * stride + s, found);
      top[i] = max(top[i], found);
    }
  }
  float scale[HEADS];
  for (int i = 0; i < HEADS; i++) {
    const Lanes shift = all(-highest(top[i]));
    Lanes total = zeros();
    for (int s = 0; s < count; s += L) {
      const Lanes weights = exponential(add(load(scores + i * stride + s), shift));
      store(scores + i * stride + s, weights);
      total = add(total, weights);
    }
    scale[i] = 1.0f / sum(total);
  }
  int i = 0;
  for (; i + 4 * L <= d; i += 4 * L) weighted<HEADS, 2>(scores, stride, values + base + i, sight, d, scale, out + i);
  if (i < d) weighted<HEADS, 1>(scores, stride, values + base + i, sight, d, scale, out + i);
}

inline Lanes silu(Lanes x) { return mul(x, divide(all(1.0f), add(all(1.0f), exponential(mul(x, all(-1.0f)))))); }

template <class X> void gate(const float* both, int width, X* out) {
  for (int i = 0; i < width; i += L) store(out + i, mul(silu(load(both + i)), load(both + width + i)));
}

template <class X>
void run(const Layer* layers, int count, const Pass& pass, void* const* keys, void* const* values, float* x) {
  const int M = pass.rows, D = pass.width, d = pass.head_dim, H = pass.heads;
  X* inputs = (X*)pass.inputs;
  float* mixed = (float*)pass.mixed;
  // Heads that share keys and values are computed together where there are enough of them for all threads.
  const int group = H / pass.kv_heads;
  int together = group % 4 == 0 ? 4 : group % 3 == 0 ? 3 : group % 2 == 0 ? 2 : 1;
  if (M * H / together < 2 * pass.threads) together = 1;
#pragma omp parallel num_threads(pass.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const size_t stride = pass.capacity + L;
    float* scores = pass.scores + thread * MAX_HEADS * stride;
    const Inputs in{inputs, pass.sums};
    for (int l = 0; l < count; l++) {
      const Layer& layer = layers[l];
      X *K = (X*)keys[l], *V = (X*)values[l];
      auto block_sums = [&](const Product& p, int m) { return p.kind == INT4 ? pass.sums + size_t(m) * (p.k / BLOCK) : nullptr; };
      for (int m = thread; m < M; m += threads) {
        rms_norm(x + size_t(m) * D, layer.input_gain, layer.input_eps, D, inputs + size_t(m) * D);
        finish_row(inputs + size_t(m) * D, D, block_sums(layer.qkv, m));
      }
#pragma omp barrier
      multiply(layer.qkv, in, M, mixed, false, thread, threads);
#pragma omp barrier
      for (int m = thread; m < M; m += threads) settle(layer, pass, m, K, V);
#pragma omp barrier
      for (int t = thread; t < M * H / together; t += threads) {
        const int m = t * together / H, h = t * together % H;
        X* out = inputs + (size_t(m) * H + h) * d;
        if (together == 4) attend<4>(layer, pass, m, h, K, V, scores, stride, out);
        else if (together == 3) attend<3>(layer, pass, m, h, K, V, scores, stride, out);
        else if (together == 2) attend<2>(layer, pass, m, h, K, V, scores, stride, out);
        else attend<1>(layer, pass, m, h, K, V, scores, stride, out);
      }
#pragma omp barrier
      if (layer.o.kind == INT4) {
        for (int m = thread; m < M; m += threads) finish_row(inputs + size_t(m) * H * d, H * d, block_sums(layer.o, m));
#pragma omp barrier
      }
      multiply(layer.o, in, M, x, true, thread, threads);
#pragma omp barrier
      for (int m = thread; m < M; m += threads) {
        rms_norm(x + size_t(m) * D, layer.post_gain, layer.post_eps, D, inputs + size_t(m) * D);
        finish_row(inputs + size_t(m) * D, D, block_sums(layer.gate_up, m));
      }
#pragma omp barrier
      multiply(layer.gate_up, in, M, mixed, false, thread, threads);
#pragma omp barrier
      const int inner = layer.down.k;
      for (int m = thread; m < M; m += threads) {
        gate(mixed + size_t(m) * 2 * inner, inner, inputs + size_t(m) * inner);
        finish_row(inputs + size_t(m) * inner, inner, block_sums(layer.down, m));
      }
#pragma omp barrier
      multiply(layer.down, in, M, x, true, thread, threads);
#pragma omp barrier
    }
  }
}

// ---- A drafter's step -----------------------------------------------------------------------------------------------

struct Drafter {
  Product from_hidden, to_hidden, head;
  const float* gain;
  float eps;
  int32_t rows, threads;
  char* inputs;          // [M, wider of D and H] of X
  float *inner, *normed; // [M, H], [M, D]
};

// logits = head(x), x = unit gain + to_hidden silu(from_hidden unit + state), unit = h / rms(h).
template <class X> void draft(const Drafter& drafter, const X* hidden, const float* state, float* logits) {
  const int M = drafter.rows, D = drafter.from_hidden.k, H = drafter.from_hidden.n;
  X* inputs = (X*)drafter.inputs;
  const Inputs in{inputs, nullptr};
#pragma omp parallel num_threads(drafter.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    for (int m = thread; m < M; m += threads) {
      const X* x = hidden + size_t(m) * D;
      Lanes squares = zeros();
      for (int i = 0; i < D; i += L) squares = fma(load(x + i), load(x + i), squares);
      const Lanes scale = all(1.0f / std::sqrt(sum(squares) / D + drafter.eps));
      for (int i = 0; i < D; i += L) {
        const Lanes unit = mul(load(x + i), scale);
        store(inputs + size_t(m) * D + i, unit);
        store(drafter.normed + size_t(m) * D + i, mul(unit, load(drafter.gain + i)));
      }
    }
#pragma omp barrier
    multiply(drafter.from_hidden, in, M, drafter.inner, false, thread, threads);
#pragma omp barrier
    for (int m = thread; m < M; m += threads)
      for (size_t i = size_t(m) * H; i < size_t(m + 1) * H; i += L)
        store(inputs + i, silu(add(load(drafter.inner + i), load(state + i))));
#pragma omp barrier
    multiply(drafter.to_hidden, in, M, drafter.normed, true, thread, threads);
#pragma omp barrier
    for (int m = thread; m < M; m += threads)
      for (size_t i = size_t(m) * D; i < size_t(m + 1) * D; i += L) store(inputs + i, load(drafter.normed + i));
#pragma omp barrier
    multiply(drafter.head, in, M, logits, false, thread, threads);
  }
}

}  // namespace

extern "C" {

// x [M, D] float32 in place through `count` layers.
void dvi_layers(const Layer* layers, int count, const Pass* pass, void* const* keys, void* const* values, float* x) {
  if (layers[0].qkv.kind == FLOAT32) run<float>(layers, count, *pass, keys, values, x);
  else run<uint16_t>(layers, count, *pass, keys, values, x);
}

// y [M, N] float32 = x W^T + b; x [M, K] float32 for a float32 weight, else bfloat16. sums: [M, K/32], for INT4 alone.
void dvi_product(const Product* p, const void* x, int rows, float* sums, float* y, int threads_wanted) {
  if (p->kind == INT4)
    for (int m = 0; m < rows; m++) sum_blocks((const uint16_t*)x + size_t(m) * p->k, p->k, sums + size_t(m) * (p->k / BLOCK));
#pragma omp parallel num_threads(threads_wanted)
  multiply(*p, Inputs{x, sums}, rows, y, false, omp_get_thread_num(), omp_get_num_threads());
}

// out [M, D] = x / sqrt(mean(x^2) + eps) * gain; x float32, out float32 or, where is_half, bfloat16.
void dvi_norm(const float* x, const float* gain, float eps, int rows, int width, int is_half, void* out) {
  for (int m = 0; m < rows; m++) {
    if (is_half) rms_norm(x + size_t(m) * width, gain, eps, width, (uint16_t*)out + size_t(m) * width);
    else rms_norm(x + size_t(m) * width, gain, eps, width, (float*)out + size_t(m) * width);
  }
}

// logits [M, V] float32 of hidden [M, D], float32 for float32 weights, else bfloat16; state [M, H] float32.
void dvi_draft(const Drafter* drafter, const void* hidden, const float* state, float* logits) {
  if (drafter->head.kind == FLOAT32) draft(*drafter, (const float*)hidden, state, logits);
  else draft(*drafter, (const uint16_t*)hidden, state, logits);
}

// For the caller to hold its own layout against.
int dvi_size_of_product() { return sizeof(Product); }
int dvi_size_of_layer() { return sizeof(Layer); }
int dvi_size_of_pass() { return sizeof(Pass); }
int dvi_size_of_drafter() { return sizeof(Drafter); }

}  // extern "C"
