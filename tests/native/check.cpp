// The kernels of plain C++ without Python: every product against a loop, on 1, 2, 3 and 5 threads. Built for another processor it
// shows that the kernels are right there; with -fsanitize=thread, that no thread writes what another one reads.
#include "../../rarefy/kernels/native/decoder.hpp"
#include "../../rarefy/kernels/native/mixture.hpp"
#include "../../rarefy/kernels/native/multiply.hpp"
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>

using namespace rarefy;
using Floats = std::vector<float>;

namespace {

const Kernels& run = generic();
std::mt19937 random_bits(7);
float normal() { return std::normal_distribution<float>()(random_bits); }
bool chance(double p) { return std::bernoulli_distribution(p)(random_bits); }
i64 between(i64 low, i64 high) { return std::uniform_int_distribution<i64>(low, high)(random_bits); }
Floats normals(i64 n) {
  Floats out(n);
  for (float& f : out) f = normal();
  return out;
}

int checks = 0;

void fail(const char* what, i64 rows, i64 columns, i64 batch, int threads) {
  std::printf("%s: %lld x %lld, %lld rows of x, %d threads\n", what, (long long)rows, (long long)columns, (long long)batch, threads);
  std::exit(1);
}

// `product(x, bias, y, batch, threads)` must be x W^T + b, and the same bits on every number of threads.
void check(const char* what, const Floats& w, i64 rows, i64 columns, i64 most, const std::function<Floats(const float*, i64)>& seen,
           const std::function<void(const float*, const float*, float*, i64, int)>& product) {
  for (i64 batch : {i64(1), i64(3), i64(6), most}) {
    const Floats x = normals(batch * columns), bias = normals(rows), in = seen(x.data(), batch);
    Floats first;
    for (int threads : {1, 2, 3, 5}) {
      Floats y(batch * rows, NAN);
      product(x.data(), bias.data(), y.data(), batch, threads);
      if (first.empty()) first = y;
      if (std::memcmp(first.data(), y.data(), y.size() * sizeof(float))) fail(what, rows, columns, batch, threads);
      checks++;
      for (i64 b = 0; threads == 1 && b < batch; b++)
        for (i64 r = 0; r < rows; r++) {
          double want = bias[r], terms = std::fabs(bias[r]);
          for (i64 c = 0; c < columns; c++) want += double(w[r * columns + c]) * in[b * columns + c], terms += std::fabs(double(w[r * columns + c]) * in[b * columns + c]);
          if (!(std::fabs(y[b * rows + r] - want) <= 1e-5 * terms + 1e-4)) fail(what, rows, columns, batch, threads);
        }
    }
  }
}

Floats as_it_is(const float* x, i64 n) { return {x, x + n}; }

struct Bits {
  std::vector<std::uint8_t> bits;
  std::vector<i64> start{0};
  Floats values;
  Bitmask matrix;
  Bits(const Floats& w, i64 rows, i64 columns) : bits(rows * ((columns + 7) / 8)) {
    for (i64 r = 0; r < rows; r++) {
      for (i64 c = 0; c < columns; c++)
        if (w[r * columns + c] != 0) bits[r * ((columns + 7) / 8) + c / 8] |= 1 << c % 8, values.push_back(w[r * columns + c]);
      start.push_back(i64(values.size()));
    }
    matrix = {bits.data(), start.data(), values.data(), rows, columns};
  }
};

struct Cut {
  std::vector<std::uint16_t> index;
  std::vector<i64> start{0};
  Floats values;
  Blocks matrix;
  Cut(const Floats& w, i64 rows, i64 columns, i64 height, i64 width) {
    matrix = {nullptr, nullptr, nullptr, rows, columns, height, width};
    const auto entry = [&](i64 r, i64 c) { return r < rows && c < columns ? w[r * columns + c] : 0.0f; };
    for (i64 row = 0; row < matrix.high(); row++)
      for (i64 part = 0; part < matrix.parts(); part++) {
        for (i64 k = part * matrix.part(); k < std::min((part + 1) * matrix.part(), matrix.wide()); k++) {
          Floats block;
          for (i64 c = 0; c < width; c++)
            for (i64 r = 0; r < height; r++) block.push_back(entry(row * height + r, k * width + c));
          if (std::all_of(block.begin(), block.end(), [](float f) { return f == 0; })) continue;
          index.push_back(std::uint16_t(k));
          values.insert(values.end(), block.begin(), block.end());
        }
        start.push_back(i64(index.size()));
      }
    matrix.index = index.data(), matrix.values = values.data(), matrix.start = start.data();
  }
};

struct Slots {
  std::vector<std::uint8_t> positions;
  Floats values, dense;
  NofM matrix;
  Slots(i64 rows, i64 columns, int n, int m) : dense(rows * columns) {
    matrix = {nullptr, nullptr, rows, columns, n, m, m <= 2 ? 1 : m <= 4 ? 2 : 3};
    positions.assign(rows * matrix.bytes(), 0);
    values.assign(rows * matrix.slots(), 0.0f);
    for (i64 r = 0; r < rows; r++)
      for (i64 s = 0; s < matrix.slots(); s++) {
        const i64 first = s / n * m, at = between(0, std::min<i64>(m, columns - first) - 1);
        const std::uint32_t bits = std::uint32_t(at) << s % 8 * matrix.bits;
        for (int i = 0; i < matrix.bits; i++) positions[r * matrix.bytes() + s / 8 * matrix.bits + i] |= std::uint8_t(bits >> 8 * i);
        dense[r * columns + first + at] += values[r * matrix.slots() + s] = normal();
      }
    matrix.values = values.data(), matrix.positions = positions.data();
  }
};

// Random codes, scales of 1/2, 1/4 or 1/8, zeros of 0 or -1; by rows, some groups missing, and the same by columns.
struct Codes {
  i64 groups, rows, columns, high, strips;
  int bits;
  std::vector<std::uint8_t> codes, present, turned;
  std::vector<std::uint16_t> scale, zero, by_group, zero_by_group;
  std::vector<i64> start{0};
  Floats dense;
  Grouped by_rows;
  GroupedColumns by_columns;
  Codes(i64 rows, i64 columns, int bits, bool asymmetric) : groups((columns + 31) / 32), rows(rows), columns(columns), bits(bits), dense(rows * columns) {
    by_columns = {nullptr, nullptr, nullptr, rows, columns, bits};
    strips = by_columns.strips(), high = strips * by_columns.height();
    present.assign(rows * ((groups + 7) / 8), 0);
    turned.assign(groups * by_columns.group_bytes(), 0);
    by_group.assign(groups * high, 0), zero_by_group = by_group;
    for (i64 r = 0; r < rows; r++) {
      for (i64 g = 0; g < groups; g++)
        if (chance(0.7)) group(r, g, asymmetric);
      start.push_back(i64(scale.size()));
    }
    by_rows = {codes.data(), scale.data(), asymmetric ? zero.data() : nullptr, present.data(), start.data(), rows, columns, bits};
    by_columns.codes = turned.data(), by_columns.scale = by_group.data(), by_columns.zero = asymmetric ? zero_by_group.data() : nullptr;
  }

private:
  void group(i64 r, i64 g, bool asymmetric) {
    const int power = int(between(1, 3)), low = asymmetric && chance(0.5) ? -1 : 0;
    present[r * ((groups + 7) / 8) + g / 8] |= 1 << g % 8;
    scale.push_back(std::uint16_t((15 - power) << 10)), zero.push_back(low ? 0xbc00 : 0);
    by_group[g * high + r] = scale.back(), zero_by_group[g * high + r] = zero.back();
    std::uint8_t byte[32] = {};
    for (i64 c = 0; c < 32; c++) {
      const int code = int(between(0, (1 << bits) - 1));
      byte[bits == 4 ? c % 16 : c] |= bits == 4 && c >= 16 ? code << 4 : code;
      if (g * 32 + c < columns) dense[r * columns + g * 32 + c] = std::ldexp(float(asymmetric ? code : code - (1 << (bits - 1))), -power) + float(asymmetric ? low : 0);
      const i64 height = by_columns.height(), s = r / height, in = r % height, panel = s / 32 * 32, row = in % 32;
      const i64 stride = std::min<i64>(strips - panel, 32) * 32;
      turned[g * by_columns.group_bytes() + panel * 1024 + c * stride + (s - panel) * 32 + row / 4 % 2 * 16 + row / 8 * 4 + row % 4] |= in >= 32 ? code << 4 : code;
    }
    codes.insert(codes.end(), byte, byte + (bits == 4 ? 16 : 32));
  }
};

// x as 8 bits give it back.
struct Rounding {
  std::vector<std::int8_t> code;
  Floats figures;
  Rounded rounded;
  Rounding(const float* x, i64 batch, i64 columns) : code(batch * ((columns + 31) / 32) * 32), figures(2 * batch * ((columns + 31) / 32)) {
    const i64 groups = (columns + 31) / 32;
    rounded = {groups, code.data(), figures.data(), figures.data() + batch * groups};
    run.round(x, batch, columns, rounded);
  }
  Floats back(i64 batch, i64 columns) const {
    Floats out(batch * columns);
    for (i64 i = 0; i < batch * columns; i++) {
      const i64 b = i / columns, c = i % columns, at = b * rounded.groups + c / 32;
      out[i] = float(code[at * 32 + c % 32]) * rounded.scale[at];
    }
    return out;
  }
};

Floats sparse(i64 rows, i64 columns, double density) {
  Floats w = normals(rows * columns);
  for (float& f : w) f = chance(density) ? f : 0.0f;
  w[0] = 1;
  return w;
}

void products(i64 rows, i64 columns) {
  const auto plain = [columns](const float* x, i64 batch) { return as_it_is(x, batch * columns); };
  const auto in_8_bits = [columns](const float* x, i64 batch) { return Rounding(x, batch, columns).back(batch, columns); };
  const Floats w = sparse(rows, columns, 0.4);
  const i64 work = rows * columns;
  const Dense dense{w.data(), rows, columns};
  check("dense", w, rows, columns, 9, plain, [&](const float* x, const float* bias, float* y, i64 batch, int threads) {
    parallel(rows, threads, work, [&](i64 from, i64 to) { run.dense(dense, x, bias, y, batch, from, to); });
  });
  const Bits bits(w, rows, columns);
  check("bitmask", w, rows, columns, 9, plain, [&](const float* x, const float* bias, float* y, i64 batch, int threads) {
    parallel(rows, threads, work, [&](i64 from, i64 to) { run.bitmask(bits.matrix, x, bias, y, batch, from, to); });
  });
  Floats turned(rows * columns);
  for (i64 r = 0; r < rows; r++)
    for (i64 c = 0; c < columns; c++) turned[c * rows + r] = w[r * columns + c];
  const Columns by_columns{turned.data(), rows, columns};
  check("columns", w, rows, columns, 9, plain, [&](const float* x, const float* bias, float* y, i64 batch, int threads) {
    parallel(rows, threads, work, [&](i64 from, i64 to) { run.columns(by_columns, x, bias, y, batch, from, to); });
  });
  for (const auto& [height, width] : {std::pair<i64, i64>{1, 1}, {4, 1}, {16, 1}, {1, 32}, {3, 5}, {16, 16}}) {
    const Cut cut(w, rows, columns, height, width);
    check("blocks", w, rows, columns, 86, plain, [&](const float* x, const float* bias, float* y, i64 batch, int threads) { multiply(run, cut.matrix, x, bias, y, batch, threads); });
  }
  for (const auto& [n, m] : {std::pair<int, int>{1, 4}, {2, 4}, {1, 2}, {3, 7}}) {
    const Slots slots(rows, columns, n, m);
    check("n of m", slots.dense, rows, columns, 9, plain, [&](const float* x, const float* bias, float* y, i64 batch, int threads) {
      parallel(rows, threads, work, [&](i64 from, i64 to) { run.n_of_m(slots.matrix, x, bias, y, batch, from, to); });
    });
  }
  for (int kind = 0; kind < 4; kind++) {
    const Codes codes(rows, columns, kind < 2 ? 4 : 8, kind % 2);
    check("grouped", codes.dense, rows, columns, 9, in_8_bits, [&](const float* x, const float* bias, float* y, i64 batch, int threads) {
      const Rounding in(x, batch, columns);
      parallel(rows, threads, work, [&](i64 from, i64 to) { run.grouped(codes.by_rows, in.rounded, bias, y, batch, from, to); });
    });
    check("grouped by columns", codes.dense, rows, columns, 9, in_8_bits, [&](const float* x, const float* bias, float* y, i64 batch, int threads) {
      const Rounding in(x, batch, columns);
      parallel(codes.strips, threads, work, [&](i64 from, i64 to) { run.grouped_columns(codes.by_columns, in.rounded, bias, y, batch, from, to); }, 1);
    });
  }
}

// Two layers of one decoder: every linear in another layout, or all dense. Logits of 7 tokens, then of 1, of two sequences.
Floats decode(bool mixed, int threads, const Gate& units) {
  random_bits.seed(11);
  Model m{};
  m.hidden = 50, m.inner = 131, m.heads = 4, m.kv_heads = 2, m.head_dim = 10, m.vocab = 90, m.positions = 16, m.eps = 1e-5f;
  m.layers.resize(2);
  std::vector<Floats> kept;
  std::vector<std::unique_ptr<Bits>> bits;
  std::vector<std::unique_ptr<Cut>> cuts;
  int next = 0;
  const auto put = [&](i64 rows, i64 columns) -> Linear {
    kept.push_back(sparse(rows, columns, 0.5));
    const Floats& w = kept.back();
    for (float& f : kept.back()) f /= 8;
    const int kind = next++ % 3;
    if (!mixed || kind == 0) return Dense{w.data(), rows, columns};
    if (kind == 1) return bits.emplace_back(new Bits(w, rows, columns))->matrix;
    m.align = 12;
    return cuts.emplace_back(new Cut(w, rows, columns, next % 2 ? 1 : 3, next % 2 ? 1 : 5))->matrix;
  };
  kept.reserve(64);
  for (Layer& l : m.layers) {
    l.q.weight = put(40, 50), l.k.weight = put(20, 50), l.v.weight = put(20, 50), l.o.weight = put(50, 40);
    l.gate.weight = put(131, 50), l.up.weight = put(131, 50), l.down.weight = put(50, 131), l.units = units;
    kept.push_back(normals(50)), l.input_norm = kept.back().data();
    kept.push_back(normals(50)), l.post_norm = kept.back().data();
  }
  m.head = put(90, 50);
  kept.push_back(normals(50)), m.final_norm = kept.back().data();
  kept.push_back(normals(16 * 5)), m.cos = kept.back().data();
  kept.push_back(normals(16 * 5)), m.sin = kept.back().data();
  Floats keys(2 * 2 * 2 * 16 * 10), values(keys.size()), all;
  const Cache cache{keys.data(), values.data(), 2, 16};
  for (const auto& [from, to] : {std::pair<i64, i64>{0, 7}, {7, 8}, {8, 9}}) {
    std::vector<i64> sequence, position, wanted;
    const i64 sequences = from == 8 ? 1 : 2; // a single token too
    for (i64 p = from; p < to; p++)
      for (i64 s = 0; s < sequences; s++) sequence.push_back(s), position.push_back(p), wanted.push_back(i64(wanted.size()));
    const i64 n = i64(sequence.size());
    const Floats x = normals(n * 50);
    Floats logits(n * 90, NAN);
    step(run, m, cache, {x.data(), sequence.data(), position.data(), n}, wanted.data(), n, logits.data(), threads);
    all.insert(all.end(), logits.begin(), logits.end());
  }
  all.insert(all.end(), keys.begin(), keys.end());
  return all;
}

void decoder() {
  const float threshold = 0.01f;
  const Gate gates[] = {{}, {&threshold, 1, 0, 0}, {nullptr, 0, 131, 40}};
  for (const Gate& units : gates) {
    const Floats dense = decode(false, 1, units), one = decode(true, 1, units);
    for (std::size_t i = 0; i < dense.size(); i++)
      if (!(std::fabs(dense[i] - one[i]) <= 1e-2 * (1 + std::fabs(dense[i])))) fail("the decoder", i64(i), 0, 0, 1);
    for (int threads : {2, 3, 5})
      for (int again = 0; again < 3; again++, checks++)
        if (decode(true, threads, units) != one) fail("the decoder", 0, 0, 0, threads);
  }
}

// Six experts of which two have no rows, eleven assignments of five rows; then their weighted sum.
void mixture(i64 rows, i64 columns) {
  const i64 end[] = {3, 3, 4, 10, 10, 11}, item[] = {0, 4, 2, 2, 1, 1, 0, 3, 4, 2, 0}, experts = 6, assigned = 11, given = 5;
  const Floats w = normals(experts * rows * columns), bias = normals(experts * rows), x = normals(given * columns), share = normals(assigned);
  Floats first, summed;
  for (int threads : {1, 2, 3, 5})
    for (int again = 0; again < 3; again++, checks++) {
      Floats y(assigned * rows, NAN), out(given * rows, NAN);
      multiply(run, {w.data(), bias.data(), experts, rows, columns}, x.data(), {item, end}, y.data(), threads);
      combine(run, y.data(), assigned, rows, item, share.data(), out.data(), given, threads);
      if (first.empty()) first = y, summed = out;
      if (std::memcmp(first.data(), y.data(), y.size() * sizeof(float)) || std::memcmp(summed.data(), out.data(), out.size() * sizeof(float)))
        fail("experts", rows, columns, assigned, threads);
    }
  std::vector<double> total(given * rows);
  for (i64 e = 0, n = 0; e < experts; e++)
    for (; n < end[e]; n++)
      for (i64 r = 0; r < rows; r++) {
        double want = bias[e * rows + r];
        for (i64 c = 0; c < columns; c++) want += double(w[(e * rows + r) * columns + c]) * x[item[n] * columns + c];
        if (!(std::fabs(first[n * rows + r] - want) <= 1e-4 * (1 + std::fabs(want)))) fail("experts", rows, columns, n, 1);
        total[item[n] * rows + r] += share[n] * want;
      }
  for (i64 i = 0; i < given * rows; i++)
    if (!(std::fabs(summed[i] - total[i]) <= 1e-3)) fail("the sum of experts", rows, columns, i, 1);
}

} // namespace

int main() {
  products(1, 1), products(7, 13), products(33, 129);
  products(between(280, 340), between(240, 290));
  mixture(1, 1), mixture(7, 13), mixture(200, 300);
  decoder();
  std::printf("%d checks of the %s kernels\n", checks, run.name);
}
