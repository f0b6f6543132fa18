// x[T, I] times the rows of w[O, I], bfloat16 summed in float32, for so few rows T that reading w is the work.

#include "ahead.h"
#include "parallel.h"
#include "vectors.h"

namespace ffi = xla::ffi;

namespace lamina {
namespace {

constexpr int kRows = 4;                     // of w at a time
constexpr int64_t kTaskBytes = 128 * 1024;   // of w
constexpr int kBlocksAhead = 2;              // of kRows rows

// y[m, n] = x[m] . w[n] for `Tokens` tokens m and kRows rows n.
template <int Tokens>
void block(const uint16_t* x, const uint16_t* w, float* y, int64_t inputs, int64_t outputs, Ahead& ahead) {
  Floats totals[kLanes] = {};
  auto step = [&](auto load, int64_t k) {
    Words rows[kRows];
    for (int n = 0; n < kRows; n++) rows[n] = load(w + n * inputs + k);
    for (int m = 0; m < Tokens; m++) {
      Words token = load(x + m * inputs + k);
      for (int n = 0; n < kRows; n++) totals[m * kRows + n] = dot(totals[m * kRows + n], token, rows[n]);
    }
  };
  int64_t k = 0;
  for (; k + 2 * kLanes <= inputs; k += 2 * kLanes) {
    step([](const uint16_t* from) { return load<Words>(from); }, k);
    ahead.some();
  }
  if (k < inputs) step([](const uint16_t* from) { return load_half<Words>(from); }, k);
  Floats found = sums(totals);
  for (int m = 0; m < Tokens; m++) std::memcpy(y + m * outputs, reinterpret_cast<float*>(&found) + m * kRows, kRows * sizeof(float));
}

// The same for all tokens.
void rows(const uint16_t* x, const uint16_t* w, float* y, int64_t tokens, int64_t inputs, int64_t outputs) {
  const int64_t blocks = tokens / 4 + tokens % 4;
  Ahead ahead(w + kBlocksAhead * kRows * inputs, kRows * inputs * sizeof(*w), blocks * (inputs / (2 * kLanes)));
  int64_t m = 0;
  for (; m + 4 <= tokens; m += 4) block<4>(x + m * inputs, w, y + m * outputs, inputs, outputs, ahead);
  for (; m < tokens; m++) block<1>(x + m * inputs, w, y + m * outputs, inputs, outputs, ahead);
}

using Matrix = ffi::Buffer<ffi::BF16, 2>;
using Product = ffi::Buffer<ffi::F32, 2>;

ffi::Error matmul(ffi::ThreadPool pool, Matrix x, Matrix w, ffi::Result<Product> y) {
  const int64_t tokens = x.dimensions()[0], inputs = x.dimensions()[1], outputs = w.dimensions()[0];
  if (inputs % kLanes || outputs % kRows || w.dimensions()[1] != inputs) {
    return ffi::Error::InvalidArgument("matmul: x[T, I] and w[O, I] need I % 16 == 0 and O % 4 == 0");
  }
  const auto* xs = static_cast<const uint16_t*>(x.untyped_data());
  const auto* ws = static_cast<const uint16_t*>(w.untyped_data());
  float* ys = y->typed_data();
  const int64_t task_rows = std::max<int64_t>(1, kTaskBytes / (2 * std::max<int64_t>(inputs, 1) * kRows)) * kRows;
  parallel(pool, (outputs + task_rows - 1) / task_rows, [=](int64_t task) {
    const int64_t stop = std::min(outputs, (task + 1) * task_rows);
    for (int64_t n = task * task_rows; n < stop; n += kRows) rows(xs, ws + n * inputs, ys + n, tokens, inputs, outputs);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lamina

XLA_FFI_DEFINE_HANDLER_SYMBOL(lamina_matmul, lamina::matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<lamina::Matrix>()
                                  .Arg<lamina::Matrix>()
                                  .Ret<lamina::Product>());
