// The cached part of attention over KV pages: see pallas_kernels/paged_attention/__init__.py for the contract.
//
// A task is one request's rows (a row: one new token and one query head) that share a KV head, over some of its pages. Tasks
// are independent; where there are fewer than would keep the threads busy, a request's pages are split between
// several, and their parts merged. A page is read once for all rows of a task.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "ahead.h"
#include "parallel.h"
#include "vectors.h"

namespace ffi = xla::ffi;

namespace lamina {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int64_t kTaskRows = 32;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kSplitPages = 4;  // at least, in each part of a request
constexpr int64_t kWorthHelp = 256 * 1024;  // bytes of pages; fewer are read before another thread wakes up

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What pages hold (`Stored`), and how it meets queries and weights: as vectors of 16 float32, or of 32 elements of 16 bits
// as the halves of 16 words, which are multiplied in pairs. float8 is multiplied as the bfloat16 that it is, too. int8
// stays whole numbers: queries, and the weights of a page, become whole numbers of 16 bits with a scale of theirs. The
// scales of 8-bit pages go to scores and weights.
struct Float32 {
  using Stored = float;
  using Element = float;
  using Vector = Floats;
  using Sum = Floats;
  using Raw = Floats;  // the memory of a vector
  static Floats vector(Floats raw) { return raw; }
};
struct Bfloat16 {
  using Stored = uint16_t;
  using Element = uint16_t;
  using Vector = Words;
  using Sum = Floats;
  using Raw = Words;
  static Words vector(Words raw) { return raw; }
};
struct Float8 {
  using Stored = uint8_t;
  using Element = uint16_t;
  using Vector = Words;
  using Sum = Floats;
  using Raw = Bytes;
  static Words vector(Bytes raw) { return bfloat16_of_float8(raw); }
};
struct Int8 {
  using Stored = int8_t;
  using Element = int16_t;
  using Vector = Words;
  using Sum = Ints;
  using Raw = Bytes;
  static Words vector(Bytes raw) { return int16_of_int8(raw); }
};

template <class Page>
constexpr bool kQuantized = sizeof(typename Page::Stored) == 1;
template <class Page>
constexpr bool kPairs = std::is_same_v<typename Page::Vector, Words>;
template <class Page>
constexpr bool kWhole = std::is_same_v<typename Page::Sum, Ints>;
template <class Page>
constexpr int64_t kElements = sizeof(typename Page::Vector) / sizeof(typename Page::Element);  // of a vector

template <class Page>
typename Page::Vector read(const typename Page::Stored* from) { return Page::vector(load<typename Page::Raw>(from)); }
template <class Page>
typename Page::Vector read_half(const typename Page::Stored* from) { return Page::vector(load_half<typename Page::Raw>(from)); }

struct Call {
  int64_t B, Q, N, H, P, K, p, M;
  const float* q;
  const void* pages;
  const float* scales;  // of quantised pages, [P, 2, K, p]
  const int32_t *block_tables, *context_lens, *page_index, *q_positions;
  int64_t window;
  float scale, softcap;
  float *o, *lse;

  int64_t groups() const { return N / K; }
  int64_t rows() const { return Q * groups(); }
  // Row r of a request and KV head among all rows of q, o and lse.
  int64_t row(int64_t b, int64_t k, int64_t r) const { return (b * Q + r / groups()) * N + k * groups() + r % groups(); }
  // The keys of an entry's page and a KV head among all arrays [p, H] of pages; the values follow by K. Tables come from
  // other machines, too: no entry leads out of the pool.
  int64_t keys(int64_t b, int64_t m, int64_t k) const {
    return std::clamp<int64_t>(block_tables[b * M + m], 0, P - 1) * 2 * K + k;
  }
  int64_t first_visible(int64_t b, int64_t r) const { return q_positions[b * Q + r / groups()] - window + 1; }
};

// The rows of one task as they meet its pages: queries as the pages' elements, and the running softmax.
template <class Page>
struct State {
  using Element = typename Page::Element;
  int64_t rows, width;  // width: H rounded up to whole vectors of elements
  int64_t tokens;       // p rounded up to whole vectors
  std::unique_ptr<char[]> memory;
  Element* q;         // [rows, width]
  float* weighted;    // [rows, width]: sum of weight x v; of elements in pairs each 32 as 16 even ones and 16 odd ones
  float* scores;      // [rows, tokens], then their weights
  Element* weights;   // [rows, tokens]: the weights as elements, in pairs
  float *key_scales, *value_scales;  // [tokens], 0 where there is no token
  float scale[kTaskRows];  // what the row's scores are multiplied by
  float maximum[kTaskRows], total[kTaskRows];
  // Of a page: by what has been summed so far must shrink, and what 1 among its weights stands for.
  float shrink[kTaskRows], unit[kTaskRows];

  State(int64_t rows, int64_t H, int64_t p)
      : rows(rows), width(round_up(H, 2 * kLanes)), tokens(round_up(p, 2 * kLanes)) {
    const int64_t floats = rows * (width + width + tokens + tokens / 2) + 2 * tokens;
    memory = std::make_unique<char[]>(floats * sizeof(float) + 64);
    auto* aligned = reinterpret_cast<float*>(round_up(reinterpret_cast<int64_t>(memory.get()), 64));
    weighted = aligned;
    scores = weighted + rows * width;
    key_scales = scores + rows * tokens;
    value_scales = key_scales + tokens;
    q = reinterpret_cast<Element*>(value_scales + tokens);
    weights = q + rows * width;
    std::fill_n(maximum, rows, kNone);
    std::fill_n(total, rows, 0.0f);
    std::fill_n(unit, rows, 1.0f);
  }
};

// scores[r, j] = q[r] . k[j] for `Rows` rows and as many tokens as fill a vector; those from `count` on repeat the last.
template <class Page, int Rows>
void score(const typename Page::Element* q, int64_t width, const typename Page::Stored* k, int64_t H, int64_t count,
           float* scores, int64_t stride) {
  using Vector = typename Page::Vector;
  constexpr int kTokens = kLanes / Rows;
  constexpr int64_t kStep = kElements<Page>;
  const typename Page::Stored* keys[kTokens];
  for (int j = 0; j < kTokens; j++) keys[j] = k + std::min<int64_t>(j, count - 1) * H;
  typename Page::Sum totals[kLanes] = {};
  auto step = [&](int j, int64_t h, Vector key) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      totals[r * kTokens + j] = dot(totals[r * kTokens + j], load<Vector>(q + r * width + h), key);
    }
  };
  const int64_t stop = H / kStep * kStep;
  if constexpr (Rows < 4) {  // one token after the other: memory is read in the order in which it lies
#pragma GCC unroll 16
    for (int j = 0; j < kTokens; j++) {
      for (int64_t h = 0; h < stop; h += kStep) step(j, h, read<Page>(keys[j] + h));
    }
  } else {  // four rows and four tokens meet in registers
    for (int64_t h = 0; h < stop; h += kStep) {
#pragma GCC unroll 4
      for (int j = 0; j < kTokens; j++) step(j, h, read<Page>(keys[j] + h));
    }
  }
  if constexpr (kPairs<Page>) {
    if (stop < H) {
#pragma GCC unroll 16
      for (int j = 0; j < kTokens; j++) step(j, stop, read_half<Page>(keys[j] + stop));
    }
  }
  Floats found = floats_of(sums(totals));
  for (int r = 0; r < Rows; r++) std::memcpy(scores + r * stride, reinterpret_cast<float*>(&found) + r * kTokens, kTokens * sizeof(float));
}

// Scores of a page's first `count` tokens.
template <class Page, int Rows>
void score_page(const State<Page>& state, int64_t row, const typename Page::Stored* k, int64_t H, int64_t count, Ahead& ahead) {
  constexpr int kTokens = kLanes / Rows;
  for (int64_t j = 0; j < count; j += kTokens) {
    ahead.some();
    score<Page, Rows>(state.q + row * state.width, state.width, k + j * H, H, count - j,
                      state.scores + row * state.tokens + j, state.tokens);
  }
}

// Scores of `count` tokens of row r become their weights, and the running maximum and total follow.
template <class Page>
void weigh(const Call& call, State<Page>& state, int64_t r, int64_t count, int64_t hidden) {
  float* scores = state.scores + r * state.tokens;
  auto* elements = state.weights + r * state.tokens;
  const int64_t padded = round_up(count, 2 * kLanes);
  for (int64_t j = 0; j < padded; j += kLanes) {
    Floats x = load<Floats>(scores + j) * state.scale[r];
    if constexpr (kQuantized<Page>) x *= load<Floats>(state.key_scales + j);
    if (call.softcap > 0) {
      for (int i = 0; i < kLanes; i++) x[i] = call.softcap * std::tanh(x[i] / call.softcap);
    }
    store(scores + j, x);
  }
  std::fill_n(scores, std::min(hidden, count), kNone);
  std::fill(scores + count, scores + padded, kNone);
  Floats most = broadcast(kNone);
  for (int64_t j = 0; j < padded; j += kLanes) most = maximum(most, load<Floats>(scores + j));
  const float highest = std::max(state.maximum[r], largest(most));
  const float base = highest == kNone ? 0.0f : highest;  // no row's weights are NaN for having seen nothing yet
  Floats total = {}, heaviest = {}, all = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    Floats weights = exp_of_negative(load<Floats>(scores + j) - base);
    total += weights;
    if constexpr (kQuantized<Page>) weights *= load<Floats>(state.value_scales + j);
    store(scores + j, weights);
    if constexpr (kWhole<Page>) {
      heaviest = maximum(heaviest, weights);
      all += weights;
    } else if constexpr (kPairs<Page>) {
      store(elements + j, round_to_bfloat16(weights));
    }
  }
  if constexpr (kWhole<Page>) {
    // So many that a page's sums of weight x v are below 2^31.
    const float limit = std::min<int64_t>(32767, (int64_t{1} << 31) / (128 * padded) - 1), top = largest(heaviest);
    state.unit[r] = top / limit + 0.0f * sum(all);  // NaN, if one of them is
    const float per_unit = top > 0 ? limit / top : 0.0f;
    for (int64_t j = 0; j < padded; j += kLanes) store(elements + j, round_to_int16(load<Floats>(scores + j) * per_unit));
  }
  state.shrink[r] = std::exp(state.maximum[r] - base);
  state.total[r] = state.total[r] * state.shrink[r] + sum(total);
  state.maximum[r] = highest;
}

// weighted[r] = shrink[r] * weighted[r] + sum of weight[r, j] x v[j], for `Rows` rows, from element h on.
template <int Rows, int Chunks>
void add_chunks(State<Float32>& state, int64_t row, const float* v, int64_t H, int64_t h, int64_t count, Ahead& ahead) {
  Floats totals[Rows][Chunks];
  auto at = [&](int r, int c) { return state.weighted + (row + r) * state.width + h + c * kLanes; };
  for (int r = 0; r < Rows; r++)
    for (int c = 0; c < Chunks; c++) totals[r][c] = load<Floats>(at(r, c)) * state.shrink[row + r];
  for (int64_t j = 0; j < count; j++) {
    ahead.some();
    for (int c = 0; c < Chunks; c++) {
      Floats value = load<Floats>(v + j * H + h + c * kLanes);
      for (int r = 0; r < Rows; r++) totals[r][c] += value * state.scores[(row + r) * state.tokens + j];
    }
  }
  for (int r = 0; r < Rows; r++)
    for (int c = 0; c < Chunks; c++) store(at(r, c), totals[r][c]);
}

// The same two tokens at a time; the last of an odd number meets itself with weight 0. `Chunks`: of 32 elements each.
template <int Rows, int Chunks, class Page, class Read>
void add_pairs(State<Page>& state, int64_t row, const typename Page::Stored* v, int64_t H, int64_t h, int64_t count, Ahead& ahead,
               Read read_values) {
  typename Page::Sum even[Rows][Chunks] = {}, odd[Rows][Chunks] = {};
  for (int64_t j = 0; j < count; j += 2) {
    ahead.some();
    const auto *one = v + j * H + h, *other = v + std::min(j + 1, count - 1) * H + h;
    Words pair[Rows];
    for (int r = 0; r < Rows; r++) {
      uint32_t two;
      std::memcpy(&two, state.weights + (row + r) * state.tokens + j, sizeof two);
      pair[r] = broadcast(two);
    }
    for (int c = 0; c < Chunks; c++) {
      Words first = read_values(one + c * 2 * kLanes), second = read_values(other + c * 2 * kLanes);
      Words evens = even_pairs(first, second), odds = odd_pairs(first, second);
      for (int r = 0; r < Rows; r++) {
        even[r][c] = dot(even[r][c], evens, pair[r]);
        odd[r][c] = dot(odd[r][c], odds, pair[r]);
      }
    }
  }
  for (int r = 0; r < Rows; r++) {
    for (int c = 0; c < Chunks; c++) {
      float* sums = state.weighted + (row + r) * state.width + h + c * 2 * kLanes;
      auto add = [&](float* to, Floats found) { store(to, load<Floats>(to) * state.shrink[row + r] + found * state.unit[row + r]); };
      add(sums, floats_of(even[r][c]));
      add(sums + kLanes, floats_of(odd[r][c]));
    }
  }
}

// From element h on as many chunks at a time as registers hold sums of, then fewer.
template <int Rows, int Chunks, class Page>
void add_values(State<Page>& state, int64_t row, const typename Page::Stored* v, int64_t H, int64_t h, int64_t count, Ahead& ahead) {
  constexpr int64_t kStep = Chunks * kElements<Page>;
  for (; h + kStep <= H; h += kStep) {
    if constexpr (kPairs<Page>) {
      add_pairs<Rows, Chunks>(state, row, v, H, h, count, ahead, read<Page>);
    } else {
      add_chunks<Rows, Chunks>(state, row, v, H, h, count, ahead);
    }
  }
  if constexpr (Chunks > 1) {
    add_values<Rows, Chunks / 2>(state, row, v, H, h, count, ahead);
  } else if constexpr (kPairs<Page>) {
    if (h < H) add_pairs<Rows, 1>(state, row, v, H, h, count, ahead, read_half<Page>);
  }
}

// `each(rows, row)` for all rows in groups of 8 (where `Most` allows), 4, 2 or 1, `rows` as a constant.
template <int Most, class Each>
void by_group(int64_t rows, const Each& each) {
  int64_t row = 0;
  if constexpr (Most >= 8) for (; row + 8 <= rows; row += 8) each(std::integral_constant<int, 8>(), row);
  for (; row + 4 <= rows; row += 4) each(std::integral_constant<int, 4>(), row);
  for (; row + 2 <= rows; row += 2) each(std::integral_constant<int, 2>(), row);
  for (; row < rows; row++) each(std::integral_constant<int, 1>(), row);
}

// How often the scores of a page's tokens, and the values added, leave time to fetch something.
int64_t score_steps(int64_t rows, int64_t count) {
  int64_t steps = 0;
  by_group<4>(rows, [&](auto group, int64_t) { steps += (count * group + kLanes - 1) / kLanes; });
  return steps;
}

template <class Page>
int64_t add_steps(int64_t rows, int64_t H, int64_t count) {
  const int64_t most = 16 * kLanes;  // elements of sums in registers, see add_values
  int64_t steps = 0;
  by_group<8>(rows, [&](auto group, int64_t) { steps += (count + kPairs<Page>) / (1 + kPairs<Page>) * ((H * group + most - 1) / most); });
  return steps;
}

template <class Page>
void start(const Call& call, State<Page>& state, int64_t b, int64_t k, int64_t first_row) {
  std::fill_n(state.weighted, state.rows * state.width, 0.0f);
  for (int64_t r = 0; r < state.rows; r++) {
    const float* from = call.q + call.row(b, k, first_row + r) * call.H;
    auto* to = state.q + r * state.width;
    state.scale[r] = call.scale;
    auto each = [&](auto run) {
      for (int64_t h = 0; h < call.H; h += kLanes) run(load<Floats>(from + h), to + h);
    };
    if constexpr (kWhole<Page>) {
      Floats most = {}, all = {};
      each([&](Floats x, auto*) { most = maximum(most, absolute(x)), all += x; });
      const float top = largest(most), per_unit = top > 0 ? 32767 / top : 0.0f;
      state.scale[r] *= top / 32767 + 0.0f * sum(all);  // NaN, if one of them is
      each([&](Floats x, auto* put) { store(put, round_to_int16(x * per_unit)); });
    } else if constexpr (kPairs<Page>) {
      each([](Floats x, auto* put) { store(put, round_to_bfloat16(x)); });
    } else {
      std::copy_n(from, call.H, to);
    }
    std::fill(to + call.H, to + state.width, typename Page::Element{});
  }
}

void take_scales(const float* from, int64_t count, int64_t tokens, float* to) {
  std::copy_n(from, count, to);
  std::fill(to + count, to + tokens, 0.0f);
}

// Entries [start, stop) of a request's block table, all of which hold cached tokens. `after`: the keys that are likely to
// be read after them.
template <class Page>
void attend(const Call& call, State<Page>& state, int64_t b, int64_t k, int64_t first_row, int64_t start, int64_t stop, int64_t after) {
  const int64_t head = call.p * call.H;
  const auto* stored = static_cast<const typename Page::Stored*>(call.pages);
  for (int64_t m = start; m < stop; m++) {
    const int64_t position = static_cast<int64_t>(call.page_index[b * call.M + m]) * call.p;
    const int64_t count = std::min<int64_t>(call.p, call.context_lens[b] - position);
    if (count <= 0) continue;  // only where page_index does not increase
    const int64_t k_at = call.keys(b, m, k), v_at = k_at + call.K, next = m + 1 < stop ? call.keys(b, m + 1, k) : after;
    const int64_t bytes = head * static_cast<int64_t>(sizeof(*stored));
    Ahead keys_ahead(stored + next * head, bytes, score_steps(state.rows, count));
    Ahead values_ahead(stored + (next + call.K) * head, bytes, add_steps<Page>(state.rows, call.H, count));
    if constexpr (kQuantized<Page>) {
      take_scales(call.scales + k_at * call.p, count, state.tokens, state.key_scales);
      take_scales(call.scales + v_at * call.p, count, state.tokens, state.value_scales);
      Ahead(call.scales + next * call.p, call.p * sizeof(float), 1).some();
      Ahead(call.scales + (next + call.K) * call.p, call.p * sizeof(float), 1).some();
    }
    by_group<4>(state.rows, [&](auto rows, int64_t row) {
      score_page<Page, rows>(state, row, stored + k_at * head, call.H, count, keys_ahead);
    });
    for (int64_t r = 0; r < state.rows; r++) {
      const int64_t hidden = call.first_visible(b, first_row + r) - position;
      weigh(call, state, r, count, std::max<int64_t>(hidden, 0));
    }
    by_group<8>(state.rows, [&](auto rows, int64_t row) {
      constexpr int kChunks = (kPairs<Page> ? 8 : 16) / std::max<int>(rows, 2);  // sums in registers: 16, or 8 of one row
      add_values<rows, kChunks>(state, row, stored + v_at * head, call.H, 0, count, values_ahead);
    });
  }
}

// The part of a request's entries that a task reads: [start, stop), all within the context and some window.
struct Span {
  int64_t start, stop;
};

Span visited(const Call& call, int64_t b) {
  const int32_t* places = call.page_index + b * call.M;
  int64_t first = std::numeric_limits<int64_t>::max();
  for (int64_t r = 0; r < call.Q; r++) first = std::min<int64_t>(first, call.q_positions[b * call.Q + r] - call.window + 1);
  const int64_t context = call.context_lens[b];
  auto before = [&](int64_t position) {  // entries whose page lies wholly before it
    return std::partition_point(places, places + call.M, [&](int64_t place) { return (place + 1) * call.p <= position; }) - places;
  };
  auto begun = std::partition_point(places, places + call.M, [&](int64_t place) { return place * call.p < context; }) - places;
  return {std::min(before(first), begun), begun};
}

// o of row r as it is asked for, from its sums; the even and odd elements of pairs back in their places.
template <class Page>
void write(const Call& call, const float* weighted, float maximum, float total, int64_t at) {
  float* o = call.o + at * call.H;
  const bool seen = total != 0;  // NaN is not hidden
  const float inverse = seen ? 1.0f / total : 0.0f;
  auto put = [&](int64_t h, float x) { o[h] = seen ? x * inverse : 0.0f; };
  if constexpr (kPairs<Page>) {
    for (int64_t h = 0; h < call.H; h += 2 * kLanes) {
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, (call.H - h) / 2); i++) {
        put(h + 2 * i, weighted[h + i]);
        put(h + 2 * i + 1, weighted[h + kLanes + i]);
      }
    }
  } else {
    for (int64_t h = 0; h < call.H; h++) put(h, weighted[h]);
  }
  call.lse[at] = seen ? maximum + std::log(total) : kNone;
}

template <class Page>
void run(ffi::ThreadPool& pool, const Call& call) {
  const int64_t tiles = (call.rows() + kTaskRows - 1) / kTaskRows, whole = call.B * call.K * tiles;
  std::vector<Span> spans(call.B);
  int64_t longest = 0, pages = 0;
  for (int64_t b = 0; b < call.B; b++) {
    spans[b] = visited(call, b);
    longest = std::max(longest, spans[b].stop - spans[b].start);
    pages += spans[b].stop - spans[b].start;
  }
  const int64_t bytes = pages * 2 * call.K * call.p * call.H * static_cast<int64_t>(sizeof(typename Page::Stored));
  const int64_t wanted = bytes < kWorthHelp ? 1 : kTasksPerThread * pool.num_threads();
  const int64_t splits = std::clamp<int64_t>(std::min((wanted + whole - 1) / std::max<int64_t>(whole, 1), longest / kSplitPages), 1, 64);
  const int64_t tile_rows = std::min(call.rows(), kTaskRows), width = round_up(call.H, 2 * kLanes);
  // Of each part of a split request: maximum, total and weighted sums of every row.
  const int64_t record = width + 2;
  std::vector<float> parts(splits > 1 ? whole * splits * tile_rows * record : 0);

  // Task i: of request b, KV head k and rows from first_row on, the entries [start, stop).
  struct Task {
    int64_t b, k, first_row, start, stop;
  };
  auto task = [&](int64_t i) {
    const int64_t split = i % splits, item = i / splits, b = item / (call.K * tiles);
    const int64_t begin = spans[b].start, length = spans[b].stop - begin;
    return Task{b, item / tiles % call.K, item % tiles * kTaskRows, begin + length * split / splits, begin + length * (split + 1) / splits};
  };
  // `stride`: between the tasks of one thread, if they all take as long.
  auto work = [&](int64_t i, int64_t stride) {
    const auto [b, k, first_row, begin, end] = task(i);
    const Task later = task(std::min(i + stride, whole * splits - 1));
    const int64_t after = call.M > 0 ? call.keys(later.b, std::min(later.start, call.M - 1), later.k) : 0;
    State<Page> state(std::min(kTaskRows, call.rows() - first_row), call.H, call.p);
    start(call, state, b, k, first_row);
    attend(call, state, b, k, first_row, begin, end, after);
    for (int64_t r = 0; r < state.rows; r++) {
      const float* weighted = state.weighted + r * state.width;
      if (splits == 1) {
        write<Page>(call, weighted, state.maximum[r], state.total[r], call.row(b, k, first_row + r));
      } else {
        float* part = parts.data() + (i * tile_rows + r) * record;
        part[0] = state.maximum[r];
        part[1] = state.total[r];
        std::copy_n(weighted, width, part + 2);
      }
    }
  };
  if (bytes < kWorthHelp) {
    for (int64_t i = 0; i < whole; i++) work(i, 1);
    return;
  }
  const int64_t at_once = threads(pool);
  parallel(pool, whole * splits, [&](int64_t i) { work(i, at_once); });
  if (splits == 1) return;
  for (int64_t item = 0; item < whole; item++) {
    const int64_t b = item / (call.K * tiles), k = item / tiles % call.K, first_row = item % tiles * kTaskRows;
    for (int64_t r = 0; r < std::min(kTaskRows, call.rows() - first_row); r++) {
      const float* first = parts.data() + (item * splits * tile_rows + r) * record;
      const int64_t stride = tile_rows * record;
      float maximum = kNone, total = 0;
      for (int64_t s = 0; s < splits; s++) maximum = std::max(maximum, first[s * stride]);
      std::vector<float> weighted(width);
      for (int64_t s = 0; s < splits && maximum != kNone; s++) {
        const float shrink = std::exp(first[s * stride] - maximum);
        total += first[s * stride + 1] * shrink;
        for (int64_t h = 0; h < width; h++) weighted[h] += first[s * stride + 2 + h] * shrink;
      }
      write<Page>(call, weighted.data(), maximum, total, call.row(b, k, first_row + r));
    }
  }
}

ffi::Error paged_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32, 4> q, ffi::AnyBuffer pages, ffi::AnyBuffer scales,
                           ffi::Buffer<ffi::S32, 2> block_tables, ffi::Buffer<ffi::S32, 1> context_lens,
                           ffi::Buffer<ffi::S32, 2> page_index, ffi::Buffer<ffi::S32, 2> q_positions,
                           ffi::Buffer<ffi::S32, 0> window, float scale, float softcap,
                           ffi::Result<ffi::Buffer<ffi::F32, 4>> o, ffi::Result<ffi::Buffer<ffi::F32, 3>> lse) {
  auto dims = q.dimensions(), held = pages.dimensions();
  if (held.size() != 5 || held[1] != 2 || held[4] != dims[3] || dims[3] % kLanes || held[2] < 1 || dims[2] % held[2]) {
    return ffi::Error::InvalidArgument("paged_attention: pages must be [P, 2, K, p, H] with H % 16 == 0 and N % K == 0");
  }
  if (held[0] == 0) return ffi::Error::InvalidArgument("paged_attention: a pool without pages");
  if (ffi::ByteWidth(pages.element_type()) == 1 && static_cast<int64_t>(scales.element_count()) != held[0] * 2 * held[2] * held[3]) {
    return ffi::Error::InvalidArgument("paged_attention: pages of 8 bits need scales [P, 2, K, p]");
  }
  const Call call{dims[0], dims[1], dims[2], dims[3], held[0], held[2], held[3], block_tables.dimensions()[1],
                  q.typed_data(), pages.untyped_data(), static_cast<const float*>(scales.untyped_data()), block_tables.typed_data(), context_lens.typed_data(),
                  page_index.typed_data(), q_positions.typed_data(), window.typed_data()[0], scale, softcap,
                  o->typed_data(), lse->typed_data()};
  switch (pages.element_type()) {
    case ffi::F32: run<Float32>(pool, call); break;
    case ffi::U16: run<Bfloat16>(pool, call); break;
    case ffi::S8: run<Int8>(pool, call); break;
    case ffi::U8: run<Float8>(pool, call); break;
    default: return ffi::Error::InvalidArgument("paged_attention: pages must be float32, uint16, int8 or uint8");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lamina

using Tables = xla::ffi::Buffer<xla::ffi::S32, 2>;
using Queries = xla::ffi::Buffer<xla::ffi::F32, 4>;
using Lse = xla::ffi::Buffer<xla::ffi::F32, 3>;
using Lengths = xla::ffi::Buffer<xla::ffi::S32, 1>;
using Scalar = xla::ffi::Buffer<xla::ffi::S32, 0>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(lamina_paged_attention, lamina::paged_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Queries>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Tables>()
                                  .Arg<Lengths>()
                                  .Arg<Tables>()
                                  .Arg<Tables>()
                                  .Arg<Scalar>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Ret<Queries>()
                                  .Ret<Lse>());
