// The decoder as Python builds it: sizes first, then tensors by address. Python keeps the tensors alive.
#include "bindings.hpp"
#include "decoder.hpp"
#include <array>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <numeric>
#include <optional>

namespace nb = nanobind;
using namespace rarefy;
using Address = std::uintptr_t;

namespace {

void fits(i64 rows, i64 columns, i64 want_rows, i64 want_columns) {
  need(rows == want_rows && columns == want_columns, "a linear's shape is not the model's");
}

struct Decoder {
  Model m;

  Decoder(i64 hidden, i64 inner, i64 heads, i64 kv_heads, i64 head_dim, i64 vocab, i64 layers, i64 positions, float eps) {
    for (i64 size : {hidden, inner, heads, kv_heads, head_dim, vocab, layers, positions}) need(size > 0 && size < (i64(1) << 31), "sizes must be in [1, 2^31)");
    need(heads % kv_heads == 0 && head_dim % 2 == 0, "heads must be a multiple of kv_heads, and head_dim even");
    m.hidden = hidden, m.inner = inner, m.heads = heads, m.kv_heads = kv_heads, m.head_dim = head_dim, m.vocab = vocab, m.positions = positions, m.eps = eps;
    m.layers.resize(layers);
  }

  void shared(Address final_norm, Address cos, Address sin) {
    m.final_norm = at<const float>(final_norm, "final_norm");
    m.cos = at<const float>(cos, "cos"), m.sin = at<const float>(sin, "sin");
  }

  void norms(i64 layer, Address input, Address post) {
    Layer& l = of(layer);
    l.input_norm = at<const float>(input, "input_norm"), l.post_norm = at<const float>(post, "post_norm");
  }

  // `where` is q, k, v, o, gate, up, down of a layer, or head.
  void dense(i64 layer, const std::string& where, Address weight, i64 rows, i64 columns, Address bias) {
    put(layer, where, Dense{at<const float>(weight, "weight"), rows, columns}, rows, columns, bias);
  }
  void columns(i64 layer, const std::string& where, Address values, i64 rows, i64 columns, Address bias) {
    put(layer, where, columns_of(values, rows, columns), rows, columns, bias);
  }
  void bitmask(i64 layer, const std::string& where, Address bits, Address starts, Address values, i64 count, i64 rows, i64 columns, Address bias) {
    put(layer, where, bitmask_of(bits, starts, values, count, rows, columns), rows, columns, bias);
  }
  void n_of_m(i64 layer, const std::string& where, Address values, Address positions, i64 rows, i64 columns, int n, int of, Address bias) {
    put(layer, where, n_of_m_of(values, positions, rows, columns, n, of), rows, columns, bias);
  }
  void blocks(i64 layer, const std::string& where, Address index, Address starts, Address values, i64 stored, i64 rows, i64 columns, i64 height, i64 width, Address bias) {
    put(layer, where, blocks_of(index, starts, values, stored, rows, columns, height, width), rows, columns, bias);
    in_strips(height);
  }
  void grouped(i64 layer, const std::string& where, Address codes, Address scale, Address zero, Address present, Address starts, i64 stored, i64 rows, i64 columns, int bits,
               Address bias) {
    put(layer, where, grouped_of(codes, scale, zero, present, starts, stored, rows, columns, bits), rows, columns, bias);
  }

  void grouped_columns(i64 layer, const std::string& where, Address codes, i64 bytes, Address scale, Address zero, i64 scales, i64 rows, i64 columns, int bits, Address bias) {
    put(layer, where, grouped_columns_of(codes, bytes, scale, zero, scales, rows, columns, bits), rows, columns, bias);
    in_strips(64);
  }

  // `where` is a linear of a layer, for what it reads, or units. Thresholds [channels] or one for all; or the largest `keep` of every `block`.
  void gate(i64 layer, const std::string& where, Address threshold, i64 channels, i64 keep, i64 block) {
    Layer& l = of(layer);
    const std::optional<Place> place = find(l, where);
    need(place || where == "units", "there is no such linear");
    const i64 width = place ? place->columns : m.inner;
    need(channels == 0 || channels == 1 || channels == width, "a gate has one threshold, or one for every channel");
    need(block == 0 || (block > 0 && width % block == 0 && keep >= 0 && keep <= block), "a gate keeps some of every block, and blocks divide the channels");
    (place ? place->projection->gate : l.units) = Gate{channels ? at<const float>(threshold, "threshold") : nullptr, channels, block, keep};
  }

  void run(Address x, Address sequences, Address positions, i64 count, Address keys, Address values, i64 batch, i64 capacity, Address wanted, i64 many, Address logits,
           int threads) {
    need(count > 0 && many >= 0 && batch > 0 && capacity > 0, "a step has tokens, and a cache room for them");
    whole();
    const Tokens tokens{at<const float>(x, "x"), at<const i64>(sequences, "sequences"), at<const i64>(positions, "positions"), count};
    for (i64 r = 0; r < count; r++) {
      need(tokens.sequence[r] >= 0 && tokens.sequence[r] < batch, "a token's sequence is outside the batch");
      need(tokens.position[r] >= 0 && tokens.position[r] < capacity && tokens.position[r] < m.positions, "a token's position is outside the cache or the context");
    }
    const i64* rows = many ? at<const i64>(wanted, "wanted") : nullptr;
    for (i64 r = 0; r < many; r++) need(rows[r] >= 0 && rows[r] < count, "a wanted row is not among the tokens");
    need(many <= count, "more rows are wanted than there are tokens");
    const Cache cache{at<float>(keys, "keys"), at<float>(values, "values"), batch, capacity};
    float* out = many ? at<float>(logits, "logits") : nullptr;
    const Kernels& kernels = *in_use();
    nb::gil_scoped_release release;
    step(kernels, m, cache, tokens, rows, many, out, threads);
  }

private:
  void whole() {
    const auto there = [](const Linear& w) { return std::visit([](const auto& matrix) { return matrix.rows > 0; }, w); };
    need(m.final_norm && m.cos && m.sin && there(m.head), "the final norm, cos, sin or the head is missing");
    for (Layer& l : m.layers) {
      need(l.input_norm && l.post_norm, "the norms of a layer are missing");
      for (const Place& place : places(l)) need(there(place.projection->weight), "a linear of a layer is missing");
    }
  }

  void in_strips(i64 rows) {
    const i64 together = std::lcm(m.align, rows);
    need(together <= 4096, "the heights of the blocks have no small common multiple, so that threads cannot share the rows");
    m.align = together;
  }

  Layer& of(i64 layer) {
    need(layer >= 0 && layer < i64(m.layers.size()), "there is no such layer");
    return m.layers[layer];
  }

  struct Place {
    const char* name;
    Projection* projection;
    i64 rows, columns;
    bool biased;
  };
  std::array<Place, 7> places(Layer& l) const {
    const i64 q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
    return {{{"q", &l.q, q, m.hidden, true},
             {"k", &l.k, kv, m.hidden, true},
             {"v", &l.v, kv, m.hidden, true},
             {"o", &l.o, m.hidden, q, false},
             {"gate", &l.gate, m.inner, m.hidden, false},
             {"up", &l.up, m.inner, m.hidden, false},
             {"down", &l.down, m.hidden, m.inner, false}}};
  }
  std::optional<Place> find(Layer& l, const std::string& where) const {
    for (const Place& place : places(l))
      if (where == place.name) return place;
    return {};
  }

  void put(i64 layer, const std::string& where, Linear linear, i64 rows, i64 columns, Address bias) {
    const float* add = at_or_null<const float>(bias, "bias");
    if (where == "head") {
      fits(rows, columns, m.vocab, m.hidden);
      need(!add, "the head has no bias");
      m.head = linear;
      return;
    }
    const std::optional<Place> place = find(of(layer), where);
    need(place.has_value(), "there is no such linear");
    fits(rows, columns, place->rows, place->columns);
    need(!add || place->biased, "only q, k and v may have a bias");
    place->projection->weight = linear, place->projection->bias = add;
  }
};

} // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Decoder>(m, "Decoder")
      .def(nb::init<i64, i64, i64, i64, i64, i64, i64, i64, float>())
      .def("shared", &Decoder::shared)
      .def("norms", &Decoder::norms)
      .def("dense", &Decoder::dense)
      .def("columns", &Decoder::columns)
      .def("bitmask", &Decoder::bitmask)
      .def("n_of_m", &Decoder::n_of_m)
      .def("blocks", &Decoder::blocks)
      .def("grouped", &Decoder::grouped)
      .def("grouped_columns", &Decoder::grouped_columns)
      .def("gate", &Decoder::gate)
      .def("step", &Decoder::run);
}
