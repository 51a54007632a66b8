// Convolution with the passes around it, forward and backward, for CPUs: custom calls of XLA.
//
// Compiled for arrays of ELEMENT, float or double.
//
// Activations are (N, H, C, W): each row of an image holds its channels one after the other, so that a vector is a run
// of neighbouring pixels of one channel. Any number of channels then fills the vectors, and a dilation is an offset.
//
// The rows of an image whose numbers are equal modulo the dilation never mix. A unit of work is a segment of such rows:
// they are copied, with margins of zeros and with what precedes the convolution applied, into a ring of a few rows that
// stays in the cache, and each is read once. Chunks of units are fixed by shapes and the number of threads, and sums
// are added up in the order of the chunks: results do not depend on which thread does what.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Size = std::int64_t;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Sizes of the register tiles: with 32 vector registers 10 x 2 and 5 x 5, with 16 of them 5 x 2 and 3 x 3.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kOutputs = 10, kSide = 5;
#else
constexpr int kOutputs = 5, kSide = 3;
#endif

constexpr Size kSegment = 32;       // rows of a unit of work
constexpr Size kPixelsAtOnce = 512;  // pixels that the filter gradient adds up before its registers are stored
constexpr Size kMostPixels = 1 << 14;  // pixels that it adds up in a vector before the sum goes on in double precision

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T loose __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = kVectorBytes / sizeof(T);
  static type load(const T* from) { return *reinterpret_cast<const loose*>(from); }
  static void store(T* to, type value) { *reinterpret_cast<loose*>(to) = value; }
  static T sum(type value) {
    T parts[lanes];
    std::memcpy(parts, &value, sizeof(value));
    for (int step = lanes / 2; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) parts[i] += parts[i + step];
    return parts[0];
  }
};

// A comparison that lets NaN through.
template <typename T>
inline T relu(T value) {
  return value < 0 ? T(0) : value;
}

// Call work(0) ... work(count - 1) on the threads of the pool. The calling thread takes part, so that this ends even
// if no other is free.
template <typename Work>
void parallel(ffi::ThreadPool& pool, Size count, const Work& work) {
  struct Shared {
    std::atomic<Size> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto shared = std::make_shared<Shared>();
  auto run = [shared, count, &work] {
    for (Size i; (i = shared->next.fetch_add(1)) < count;) {
      work(i);
      if (shared->done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->finished.notify_all();
      }
    }
  };
  for (Size i = std::min<Size>(pool.num_threads(), count); i > 1; --i) pool.Schedule(decltype(run)(run));
  run();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done.load() == count; });
}

Size threads(const ffi::ThreadPool& pool) { return std::max<Size>(1, pool.num_threads()); }

// Memory that each thread keeps between calls, one block for each purpose.
template <typename T, int purpose>
T* scratch(Size count) {
  struct Free {
    void operator()(void* block) const { std::free(block); }
  };
  thread_local std::unique_ptr<void, Free> block;
  thread_local Size size = 0;
  const Size bytes = (count * Size(sizeof(T)) + 63) / 64 * 64;
  if (bytes > size) {
    block.reset();
    block.reset(std::aligned_alloc(64, bytes));
    if (!block) throw std::bad_alloc();
    size = bytes;
  }
  return static_cast<T*>(block.get());
}

// `count` in pieces of at most `most`, as equal as possible.
struct Pieces {
  Size count, pieces;
  Pieces(Size count, Size most) : count(count), pieces((count + most - 1) / most) {}
  Size begin(Size i) const { return count * i / pieces; }
  Size size(Size i) const { return begin(i + 1) - begin(i); }
};

// (value - mean) * factor + shift for each channel; no values: the identity, without ReLU.
template <typename T>
struct Norm {
  const T *mean = nullptr, *factor = nullptr, *shift = nullptr;
  Norm(const ffi::AnyBuffer& values, Size channels) {
    if (values.element_count() == 0) return;
    mean = values.typed_data<T>();
    factor = mean + channels;
    shift = factor + channels;
  }
  explicit operator bool() const { return mean != nullptr; }
  T operator()(T value, Size c) const { return (value - mean[c]) * factor[c] + shift[c]; }
};

// One channel of one row of a convolution's input: relu(norm(from)), or `from` without a normalisation.
template <typename T>
void fill_input(const T* from, const Norm<T>& norm, Size c, Size width, T* to) {
  if (!norm) {
    std::memcpy(to, from, width * sizeof(T));
    return;
  }
  const T mean = norm.mean[c], factor = norm.factor[c], shift = norm.shift[c];
  for (Size j = 0; j < width; ++j) to[j] = relu((from[j] - mean) * factor + shift);
}

template <typename T>
const T* optional(const ffi::AnyBuffer& values) {
  return values.element_count() ? values.typed_data<T>() : nullptr;
}

// The rows of a batch of images, cut into units of work: segments of the rows of one image that are equal modulo d.
struct Units {
  Size height, d, phases, segments, count;
  Units(Size images, Size height, Size d)
      : height(height), d(d), phases(std::min(d, height)), segments((rows(0) + kSegment - 1) / kSegment),
        count(images * phases * segments) {}
  Size rows(Size phase) const { return (height - phase + d - 1) / d; }
};

// One unit: rows begin to end - 1 of `rows`, of which row q is row first + q * d of all images together.
struct Unit {
  Size first, rows, begin, end;
  Unit(const Units& units, Size i) {
    const Size segment = i % units.segments, phase = i / units.segments % units.phases;
    first = i / (units.segments * units.phases) * units.height + phase;
    rows = units.rows(phase);
    begin = std::min(rows, segment * kSegment);
    end = std::min(rows, begin + kSegment);
  }
};

// Rows of a unit, (C, W) each, with margins of zeros on the left and on the right.
template <typename T>
struct Ring {
  Size channels, width, margin, stride, slots, next = 0;
  T* data;
  static Size padded(Size width) { return (width + 2 * Vector<T>::lanes - 1) / (2 * Vector<T>::lanes) * 2 * Vector<T>::lanes; }
  static Size stride_for(Size width, Size margin) { return padded(width) + 2 * margin; }
  static Size size(Size channels, Size width, Size margin, Size slots) {
    return slots * channels * stride_for(width, margin) + 2 * Vector<T>::lanes;
  }
  Ring(Size channels, Size width, Size margin, Size slots, T* data)
      : channels(channels), width(width), margin(margin), stride(stride_for(width, margin)), slots(slots), data(data) {
    std::memset(data, 0, size(channels, width, margin, slots) * sizeof(T));
  }
  // Go to another unit, whose first row of use is `first`. The margins are never written.
  void restart(Size first) { next = first; }
  // Copy the rows up to `last` that are missing; fill(row, channel, to) writes `width` values.
  template <typename Fill>
  void advance(Size last, const Fill& fill) {
    for (; next < last; ++next)
      for (Size c = 0; c < channels; ++c) fill(next, c, at(next) + c * stride + margin);
  }
  T* at(Size q) const { return data + q % slots * channels * stride; }
};

// out[k][x] = sum over taps and channels of in[c][x] * weights[c][k], for `K` outputs and `V` vectors of pixels.
template <typename T, int K, int V>
void convolution_tile(const T* const* in, const T* const* weights, int taps, Size channels, Size stride, T* out,
                      Size out_stride, Size left) {
  using Lanes = Vector<T>;
  typename Lanes::type sums[K][V] = {};
  for (int tap = 0; tap < taps; ++tap) {
    const T *x = in[tap], *w = weights[tap];
    for (Size c = 0; c < channels; ++c, x += stride, w += K) {
      typename Lanes::type pixels[V];
      for (int v = 0; v < V; ++v) pixels[v] = Lanes::load(x + v * Lanes::lanes);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k)
        for (int v = 0; v < V; ++v) sums[k][v] += pixels[v] * w[k];
    }
  }
  if (left >= V * Lanes::lanes) {
    for (int k = 0; k < K; ++k)
      for (int v = 0; v < V; ++v) Lanes::store(out + k * out_stride + v * Lanes::lanes, sums[k][v]);
  } else {
    for (int k = 0; k < K; ++k) std::memcpy(out + k * out_stride, sums[k], left * sizeof(T));
  }
}

// sums[a][b] += sum over rows and pixels of x[a] * g[b], for `A` inputs and `B` outputs; a lane of a vector each.
template <typename T, int A, int B>
void gradient_tile(const T* const* xs, const T* const* gs, Size rows, Size vectors, Size x_stride, Size g_stride,
                   typename Vector<T>::type* sums) {
  using Lanes = Vector<T>;
  typename Lanes::type total[A][B];
  for (int a = 0; a < A; ++a)
    for (int b = 0; b < B; ++b) total[a][b] = sums[a * B + b];
  for (Size row = 0; row < rows; ++row) {
    const T *x = xs[row], *g = gs[row];
    for (Size v = 0; v < vectors; ++v, x += Lanes::lanes, g += Lanes::lanes) {
      typename Lanes::type right[B];
      for (int b = 0; b < B; ++b) right[b] = Lanes::load(g + b * g_stride);
#pragma GCC unroll 8
      for (int a = 0; a < A; ++a) {
        const typename Lanes::type left = Lanes::load(x + a * x_stride);
        for (int b = 0; b < B; ++b) total[a][b] += left * right[b];
      }
    }
  }
  for (int a = 0; a < A; ++a)
    for (int b = 0; b < B; ++b) sums[a * B + b] = total[a][b];
}

template <typename T>
using ConvolutionTile = void (*)(const T* const*, const T* const*, int, Size, Size, T*, Size, Size);
template <typename T>
using GradientTile = void (*)(const T* const*, const T* const*, Size, Size, Size, Size, typename Vector<T>::type*);

template <typename T, int V, int K = kOutputs>
ConvolutionTile<T> convolution_tile_for(Size outputs) {
  if constexpr (K > 1) {
    if (outputs < K) return convolution_tile_for<T, V, K - 1>(outputs);
  }
  return convolution_tile<T, K, V>;
}

template <typename T, int A, int B = kSide>
GradientTile<T> gradient_tile_of(Size outputs) {
  if constexpr (B > 1) {
    if (outputs < B) return gradient_tile_of<T, A, B - 1>(outputs);
  }
  return gradient_tile<T, A, B>;
}

template <typename T, int A = kSide>
GradientTile<T> gradient_tile_for(Size inputs, Size outputs) {
  if constexpr (A > 1) {
    if (inputs < A) return gradient_tile_for<T, A - 1>(inputs, outputs);
  }
  return gradient_tile_of<T, A>(outputs);
}

// The weights of a convolution in the order in which `convolution_tile` reads them.
template <typename T>
struct Weights {
  Size side, channels, outputs;
  Pieces blocks;
  std::vector<T> values;
  // `kernel` is (side, side, C, K); `transposed`: of the input's gradient, from K channels to C.
  Weights(const T* kernel, Size side, Size inputs, Size kernels, bool transposed)
      : side(side), channels(transposed ? kernels : inputs), outputs(transposed ? inputs : kernels),
        blocks(outputs, kOutputs), values(side * side * inputs * kernels) {
    T* to = values.data();
    for (Size block = 0; block < blocks.pieces; ++block)
      for (Size tap = 0; tap < side * side; ++tap)
        for (Size c = 0; c < channels; ++c)
          for (Size i = 0; i < blocks.size(block); ++i) {
            const Size k = blocks.begin(block) + i;
            *to++ = transposed ? kernel[((side * side - 1 - tap) * inputs + k) * kernels + c]
                               : kernel[(tap * inputs + c) * kernels + k];
          }
  }
  const T* at(Size block, Size tap) const {
    return values.data() + (blocks.begin(block) * side * side + tap * blocks.size(block)) * channels;
  }
};

// One row of a convolution: row q of a unit of `rows` rows, which are in `ring`, to `out` (K, W).
template <typename T>
void convolve_row(const Ring<T>& ring, const Weights<T>& weights, Size d, Size rows, Size q, T* out) {
  constexpr Size lanes = Vector<T>::lanes;
  const Size half = weights.side / 2, width = ring.width;
  const T *in[9], *w[9];
  for (Size block = 0; block < weights.blocks.pieces; ++block) {
    const Size first = weights.blocks.begin(block), outputs = weights.blocks.size(block);
    const auto wide = convolution_tile_for<T, 2>(outputs), narrow = convolution_tile_for<T, 1>(outputs);
    for (Size x = 0; x < width;) {
      const bool two = width - x > lanes;
      int taps = 0;
      for (Size i = -half; i <= half; ++i) {
        if (q + i < 0 || q + i >= rows) continue;
        for (Size j = -half; j <= half; ++j) {
          const Size from = x + j * d;
          if (from + (two ? 2 : 1) * lanes <= 0 || from >= width) continue;  // nothing but the margin
          in[taps] = ring.at(q + i) + ring.margin + from;
          w[taps++] = weights.at(block, (i + half) * weights.side + j + half);
        }
      }
      (two ? wide : narrow)(in, w, taps, ring.channels, ring.stride, out + first * width + x, width, width - x);
      x += (two ? 2 : 1) * lanes;
    }
  }
}

template <typename T>
T sum_row(const T* values, Size count) {
  using Lanes = Vector<T>;
  typename Lanes::type sums = {};
  Size i = 0;
  for (; i + Lanes::lanes <= count; i += Lanes::lanes) sums += Lanes::load(values + i);
  T sum = Lanes::sum(sums);
  for (; i < count; ++i) sum += values[i];
  return sum;
}

// Sum of a * (b - mean); with a == b of (b - mean)^2.
template <typename T>
T sum_products(const T* a, const T* b, T mean, Size count) {
  using Lanes = Vector<T>;
  typename Lanes::type sums = {};
  Size i = 0;
  const T before = a == b ? mean : T(0);
  for (; i + Lanes::lanes <= count; i += Lanes::lanes) sums += (Lanes::load(a + i) - before) * (Lanes::load(b + i) - mean);
  T sum = Lanes::sum(sums);
  for (; i < count; ++i) sum += (a[i] - before) * (b[i] - mean);
  return sum;
}

// Mean and sum of squared deviations of the values of each channel, Chan et al. (1979).
struct Moments {
  std::vector<double> mean, squares;
  double count = 0;
  explicit Moments(Size channels) : mean(channels), squares(channels) {}
  void add(Size c, double before, double more, double other_mean, double other_squares) {
    const double delta = other_mean - mean[c], total = before + more;
    mean[c] += delta * more / total;
    squares[c] += other_squares + delta * delta * before * more / total;
  }
};

template <typename T>
struct Forward {
  const T* x;
  Size images, height, channels, width;
  const T* kernel;
  Size side, outputs, d;
  Norm<T> norm;
  const T *bias, *added;
  bool moments;
  T *z, *means, *variances;

  void run(ffi::ThreadPool& pool) const {
    const Units units(images, height, d);
    const Weights<T> weights(kernel, side, channels, outputs, false);
    const Pieces chunks(units.count, std::max<Size>(1, units.count / (8 * threads(pool))));
    std::vector<Moments> parts(chunks.pieces, Moments(moments ? outputs : 0));
    parallel(pool, chunks.pieces, [&](Size i) { chunk(units, weights, chunks.begin(i), chunks.begin(i + 1), parts[i]); });
    if (!moments) return;
    Moments all(outputs);
    for (const Moments& part : parts) {
      if (part.count == 0) continue;
      for (Size k = 0; k < outputs; ++k) all.add(k, all.count, part.count, part.mean[k], part.squares[k]);
      all.count += part.count;
    }
    for (Size k = 0; k < outputs; ++k) {
      means[k] = T(all.mean[k]);
      variances[k] = T(all.squares[k] / all.count);
    }
  }

  void chunk(const Units& units, const Weights<T>& weights, Size begin, Size end, Moments& part) const {
    const Size half = side / 2, slots = 2 * half + 1;
    Ring<T> ring(channels, width, half * d, slots, scratch<T, 0>(Ring<T>::size(channels, width, half * d, slots)));
    for (Size i = begin; i < end; ++i) {
      const Unit unit(units, i);
      ring.restart(std::max<Size>(0, unit.begin - half));
      for (Size q = unit.begin; q < unit.end; ++q) {
        ring.advance(std::min(unit.rows, q + half + 1), [&](Size row, Size c, T* to) {
          fill_input(x + ((unit.first + row * d) * channels + c) * width, norm, c, width, to);
        });
        const Size at = (unit.first + q * d) * outputs * width;
        convolve_row(ring, weights, d, unit.rows, q, z + at);
        if (bias) finish_row(z + at, added ? added + at : nullptr);
        if (moments) measure_row(z + at, part);
      }
    }
  }

  void finish_row(T* row, const T* more) const {
    for (Size k = 0; k < outputs; ++k, row += width) {
      const T value = bias[k];
      if (more) {
        for (Size j = 0; j < width; ++j) row[j] = relu(row[j] + value + more[j]);
        more += width;
      } else {
        for (Size j = 0; j < width; ++j) row[j] = relu(row[j] + value);
      }
    }
  }

  void measure_row(const T* row, Moments& part) const {
    for (Size k = 0; k < outputs; ++k, row += width) {
      const T mean = sum_row(row, width) / T(width);
      part.add(k, part.count, width, mean, sum_products(row, row, mean, width));
    }
    part.count += width;
  }
};

template <typename T>
struct Backward {
  const T *g, *z, *back;  // z: null, or the gradient of the convolution's result is taken through a normalisation
  const T* x;
  Size images, height, channels, width;
  Norm<T> norm;
  const T* kernel;
  Size side, outputs, d;
  const T* added;
  T *d_x, *d_kernel, *sums;

  struct Part {
    std::vector<double> kernel, sums;
  };

  Size rows_at_once() const { return std::max<Size>(1, std::min<Size>(8, kPixelsAtOnce / width)); }
  Size taps() const { return side * side; }

  void run(ffi::ThreadPool& pool) const {
    const Units units(images, height, d);
    const Weights<T> weights(kernel, side, channels, outputs, true);
    const Pieces chunks(units.count, std::max<Size>(1, (units.count + 2 * threads(pool) - 1) / (2 * threads(pool))));
    std::vector<Part> parts(chunks.pieces);
    parallel(pool, chunks.pieces, [&](Size i) { chunk(units, weights, chunks.begin(i), chunks.begin(i + 1), parts[i]); });
    const auto total = [&](std::vector<double> Part::*field, Size count, T* to) {
      for (Size i = 0; i < count; ++i) {
        double sum = 0;
        for (const Part& part : parts) sum += (part.*field)[i];
        to[i] = T(sum);
      }
    };
    total(&Part::kernel, taps() * channels * outputs, d_kernel);
    total(&Part::sums, 2 * channels, sums);
  }

  void chunk(const Units& units, const Weights<T>& weights, Size begin, Size end, Part& part) const {
    using Lanes = Vector<T>;
    const Size half = side / 2, margin = half * d, together = rows_at_once(), slots = together + 2 * half;
    Ring<T> x_ring(channels, width, margin, slots, scratch<T, 0>(Ring<T>::size(channels, width, margin, slots)));
    Ring<T> g_ring(outputs, width, margin, slots, scratch<T, 1>(Ring<T>::size(outputs, width, margin, slots)));
    const Size tiles = taps() * channels * outputs;
    auto* totals = scratch<typename Lanes::type, 2>(tiles);
    std::memset(static_cast<void*>(totals), 0, tiles * sizeof(*totals));
    part.kernel.assign(tiles, 0);
    part.sums.assign(2 * channels, 0);
    Size pixels = 0;
    for (Size i = begin; i < end; ++i) {
      const Unit unit(units, i);
      x_ring.restart(std::max<Size>(0, unit.begin - half));
      g_ring.restart(std::max<Size>(0, unit.begin - half));
      for (Size q = unit.begin; q < unit.end; q += together) {
        const Size stop = std::min(unit.end, q + together), last = std::min(unit.rows, stop + half);
        x_ring.advance(last, [&](Size row, Size c, T* to) {
          fill_input(x + ((unit.first + row * d) * channels + c) * width, norm, c, width, to);
        });
        g_ring.advance(last, [&](Size row, Size k, T* to) { fill_g(unit.first + row * d, k, to); });
        for (Size row = q; row < stop; ++row) {
          const Size at = unit.first + row * d;
          convolve_row(g_ring, weights, d, unit.rows, row, d_x + at * channels * width);
          finish_row(at, part);
        }
        add_products(x_ring, g_ring, unit.rows, q, stop, totals);
        if ((pixels += (stop - q) * width) >= kMostPixels) flush(totals, part), pixels = 0;
      }
    }
    flush(totals, part);
  }

  void fill_g(Size row, Size k, T* to) const {
    const Size at = (row * outputs + k) * width;
    if (!z) {
      std::memcpy(to, g + at, width * sizeof(T));
      return;
    }
    const T mean = back[k], factor = back[outputs + k], slope = back[2 * outputs + k], offset = back[3 * outputs + k];
    const T *from = g + at, *result = z + at;
    for (Size j = 0; j < width; ++j) to[j] = factor * from[j] - slope * (result[j] - mean) - offset;
  }

  // Add what else flows to the input, and go back through the ReLU that precedes the convolution.
  void finish_row(Size at, Part& part) const {
    for (Size c = 0; c < channels; ++c) {
      const Size place = (at * channels + c) * width;
      T* row = d_x + place;
      if (added) {
        const T* more = added + place;
        for (Size j = 0; j < width; ++j) row[j] += more[j];
      }
      if (!norm) continue;
      const T* value = x + place;
      const T mean = norm.mean[c], factor = norm.factor[c], shift = norm.shift[c];
      for (Size j = 0; j < width; ++j) {
        const T gradient = row[j];
        row[j] = (value[j] - mean) * factor + shift > 0 ? gradient : T(0);
      }
      part.sums[c] += sum_row(row, width);
      part.sums[channels + c] += sum_products(row, value, mean, width);
    }
  }

  // Add the products of rows q to stop - 1 of the gradient with the rows around them of the input.
  void add_products(const Ring<T>& x_ring, const Ring<T>& g_ring, Size rows, Size q, Size stop,
                    typename Vector<T>::type* totals) const {
    constexpr Size lanes = Vector<T>::lanes;
    const Size half = side / 2, vectors = (width + lanes - 1) / lanes;
    const Pieces inputs(channels, kSide), kernels(outputs, kSide);
    const T *xs[8], *gs[8];
    for (Size b = 0; b < kernels.pieces; ++b)
      for (Size a = 0; a < inputs.pieces; ++a) {
        const auto tile = gradient_tile_for<T>(inputs.size(a), kernels.size(b));
        for (Size i = -half; i <= half; ++i) {
          Size count = 0;
          for (Size row = std::max(q, -i); row < std::min(stop, rows - i); ++row, ++count) {
            xs[count] = x_ring.at(row + i) + inputs.begin(a) * x_ring.stride + x_ring.margin;
            gs[count] = g_ring.at(row) + kernels.begin(b) * g_ring.stride + g_ring.margin;
          }
          if (count == 0) continue;
          for (Size j = -half; j <= half; ++j) {
            if (std::abs(j * d) >= width) continue;  // nothing but the margin
            const T* shifted[8];
            for (Size row = 0; row < count; ++row) shifted[row] = xs[row] + j * d;
            const Size tap = (i + half) * side + j + half;
            tile(shifted, gs, count, vectors, x_ring.stride, g_ring.stride, totals + place(inputs, kernels, tap, a, b));
          }
        }
      }
  }

  Size place(const Pieces& inputs, const Pieces& kernels, Size tap, Size a, Size b) const {
    return (tap * channels + inputs.begin(a)) * outputs + inputs.size(a) * kernels.begin(b);
  }

  void flush(typename Vector<T>::type* totals, Part& part) const {
    const Pieces inputs(channels, kSide), kernels(outputs, kSide);
    for (Size tap = 0; tap < taps(); ++tap)
      for (Size a = 0; a < inputs.pieces; ++a)
        for (Size b = 0; b < kernels.pieces; ++b) {
          auto* tile = totals + place(inputs, kernels, tap, a, b);
          for (Size c = 0; c < inputs.size(a); ++c)
            for (Size k = 0; k < kernels.size(b); ++k, ++tile) {
              const Size at = (tap * channels + inputs.begin(a) + c) * outputs + kernels.begin(b) + k;
              part.kernel[at] += Vector<T>::sum(*tile);
              *tile = typename Vector<T>::type{};
            }
        }
  }
};

// The last ReLU of a block, relu(norm(z) + skip), where the skip may go through a normalisation and ReLU of its own.
template <typename T>
struct Ends {
  const T* z;
  Size rows, channels, width;
  Norm<T> norm;
  const T* skip;
  Norm<T> skip_norm;

  // The values before the ReLU, of one channel of one row.
  template <typename Use>
  void row(Size at, Size c, const Use& use) const {
    const Size place = (at * channels + c) * width;
    const T mean = norm.mean[c], factor = norm.factor[c], shift = norm.shift[c];
    const T* value = z + place;
    if (!skip) {
      for (Size j = 0; j < width; ++j) use(place, j, (value[j] - mean) * factor + shift);
    } else if (!skip_norm) {
      const T* more = skip + place;
      for (Size j = 0; j < width; ++j) use(place, j, (value[j] - mean) * factor + shift + more[j]);
    } else {
      const T* more = skip + place;
      const T m = skip_norm.mean[c], f = skip_norm.factor[c], s = skip_norm.shift[c];
      for (Size j = 0; j < width; ++j) use(place, j, (value[j] - mean) * factor + shift + relu((more[j] - m) * f + s));
    }
  }

  void forward(ffi::ThreadPool& pool, T* out) const {
    const Pieces chunks(rows, std::max<Size>(1, rows / (8 * threads(pool))));
    parallel(pool, chunks.pieces, [&](Size i) {
      for (Size at = chunks.begin(i); at < chunks.begin(i + 1); ++at)
        for (Size c = 0; c < channels; ++c)
          row(at, c, [out](Size place, Size j, T value) { out[place + j] = relu(value); });
    });
  }

  void backward(ffi::ThreadPool& pool, const T* d_out, T* d_y, T* sums) const {
    const Pieces chunks(rows, std::max<Size>(1, rows / (8 * threads(pool))));
    std::vector<std::vector<double>> parts(chunks.pieces, std::vector<double>(2 * channels));
    parallel(pool, chunks.pieces, [&](Size i) {
      for (Size at = chunks.begin(i); at < chunks.begin(i + 1); ++at)
        for (Size c = 0; c < channels; ++c) {
          // Captured by value and read before it is selected: otherwise the loop is not vectorised.
          row(at, c, [d_y, d_out](Size place, Size j, T value) {
            const T gradient = d_out[place + j];
            d_y[place + j] = value > 0 ? gradient : T(0);
          });
          const Size place = (at * channels + c) * width;
          parts[i][c] += sum_row(d_y + place, width);
          parts[i][channels + c] += sum_products(d_y + place, z + place, norm.mean[c], width);
        }
    });
    for (Size c = 0; c < 2 * channels; ++c) {
      double sum = 0;
      for (const auto& part : parts) sum += part[c];
      sums[c] = T(sum);
    }
  }
};

template <typename T>
void forward(ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::AnyBuffer norm, ffi::AnyBuffer bias,
             ffi::AnyBuffer added, ffi::AnyBuffer z, ffi::AnyBuffer moments, Size d, bool measured) {
  const auto s = x.dimensions(), k = kernel.dimensions();
  T* values = moments.typed_data<T>();
  if (x.element_count() == 0) return;
  Forward<T>{x.typed_data<T>(), s[0], s[1], s[2], s[3], kernel.typed_data<T>(), k[0], k[3], d, Norm<T>(norm, s[2]),
             optional<T>(bias), optional<T>(added), measured, z.typed_data<T>(), values, values + k[3]}
      .run(pool);
}

template <typename T>
void backward(ffi::ThreadPool& pool, ffi::AnyBuffer g, ffi::AnyBuffer z, ffi::AnyBuffer back, ffi::AnyBuffer x,
              ffi::AnyBuffer norm, ffi::AnyBuffer kernel, ffi::AnyBuffer added, ffi::AnyBuffer d_x,
              ffi::AnyBuffer d_kernel, ffi::AnyBuffer sums, Size d) {
  const auto s = x.dimensions(), k = kernel.dimensions();
  Backward<T>{g.typed_data<T>(), optional<T>(z), optional<T>(back), x.typed_data<T>(), s[0], s[1], s[2], s[3],
              Norm<T>(norm, s[2]), kernel.typed_data<T>(), k[0], k[3], d, optional<T>(added), d_x.typed_data<T>(),
              d_kernel.typed_data<T>(), sums.typed_data<T>()}
      .run(pool);
}

template <typename T>
Ends<T> ends(ffi::AnyBuffer z, ffi::AnyBuffer norm, ffi::AnyBuffer skip, ffi::AnyBuffer skip_norm) {
  const auto s = z.dimensions();
  return {z.typed_data<T>(), s[0] * s[1], s[2], s[3], Norm<T>(norm, s[2]), optional<T>(skip), Norm<T>(skip_norm, s[2])};
}

ffi::Error forward_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::AnyBuffer norm,
                        ffi::AnyBuffer bias, ffi::AnyBuffer added, ffi::Result<ffi::AnyBuffer> z,
                        ffi::Result<ffi::AnyBuffer> moments, Size d, bool measured) {
  forward<ELEMENT>(pool, x, kernel, norm, bias, added, *z, *moments, d, measured);
  return ffi::Error::Success();
}

ffi::Error backward_call(ffi::ThreadPool pool, ffi::AnyBuffer g, ffi::AnyBuffer z, ffi::AnyBuffer back,
                         ffi::AnyBuffer x, ffi::AnyBuffer norm, ffi::AnyBuffer kernel, ffi::AnyBuffer added,
                         ffi::Result<ffi::AnyBuffer> d_x, ffi::Result<ffi::AnyBuffer> d_kernel,
                         ffi::Result<ffi::AnyBuffer> sums, Size d) {
  backward<ELEMENT>(pool, g, z, back, x, norm, kernel, added, *d_x, *d_kernel, *sums, d);
  return ffi::Error::Success();
}

ffi::Error end_call(ffi::ThreadPool pool, ffi::AnyBuffer z, ffi::AnyBuffer norm, ffi::AnyBuffer skip,
                    ffi::AnyBuffer skip_norm, ffi::Result<ffi::AnyBuffer> out) {
  ends<ELEMENT>(z, norm, skip, skip_norm).forward(pool, out->typed_data<ELEMENT>());
  return ffi::Error::Success();
}

ffi::Error end_gradient_call(ffi::ThreadPool pool, ffi::AnyBuffer d_out, ffi::AnyBuffer z, ffi::AnyBuffer norm,
                             ffi::AnyBuffer skip, ffi::AnyBuffer skip_norm, ffi::Result<ffi::AnyBuffer> d_y,
                             ffi::Result<ffi::AnyBuffer> sums) {
  ends<ELEMENT>(z, norm, skip, skip_norm)
      .backward(pool, d_out.typed_data<ELEMENT>(), d_y->typed_data<ELEMENT>(), sums->typed_data<ELEMENT>());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(pdrunet_forward, forward_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<Size>("dilation")
                                  .Attr<bool>("moments"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(pdrunet_backward, backward_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<Size>("dilation"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(pdrunet_end, end_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(pdrunet_end_gradient, end_gradient_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
