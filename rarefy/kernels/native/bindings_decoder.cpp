// The decoder as Python builds it: sizes first, then tensors by address. Python keeps the tensors alive.
#include "bindings.hpp"
#include "decoder.hpp"
#include <array>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

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
  void bitmask(i64 layer, const std::string& where, Address bits, Address starts, Address values, i64 count, i64 rows, i64 columns, Address bias) {
    put(layer, where, bitmask_of(bits, starts, values, count, rows, columns), rows, columns, bias);
  }
  void grouped(i64 layer, const std::string& where, Address codes, Address scale, Address zero, Address present, Address starts, i64 stored, i64 rows, i64 columns, int bits,
               Address bias) {
    put(layer, where, grouped_of(codes, scale, zero, present, starts, stored, rows, columns, bits), rows, columns, bias);
  }

  void run(Address x, Address sequences, Address positions, i64 count, Address keys, Address values, i64 batch, i64 capacity, Address wanted, i64 many, Address logits,
           int threads) {
    need(count > 0 && many >= 0 && batch > 0 && capacity > 0, "a step has tokens, and a cache room for them");
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
  Layer& of(i64 layer) {
    need(layer >= 0 && layer < i64(m.layers.size()), "there is no such layer");
    return m.layers[layer];
  }

  void put(i64 layer, const std::string& where, Linear linear, i64 rows, i64 columns, Address bias) {
    const float* add = bias ? at<const float>(bias, "bias") : nullptr;
    const i64 q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
    if (where == "head") {
      fits(rows, columns, m.vocab, m.hidden);
      need(!add, "the head has no bias");
      m.head = linear;
      return;
    }
    Layer& l = of(layer);
    struct Place {
      const char* name;
      Linear* linear;
      const float** bias;
      i64 rows, columns;
    };
    const std::array<Place, 7> places{{{"q", &l.q, &l.q_bias, q, m.hidden},
                                       {"k", &l.k, &l.k_bias, kv, m.hidden},
                                       {"v", &l.v, &l.v_bias, kv, m.hidden},
                                       {"o", &l.o, nullptr, m.hidden, q},
                                       {"gate", &l.gate, nullptr, m.inner, m.hidden},
                                       {"up", &l.up, nullptr, m.inner, m.hidden},
                                       {"down", &l.down, nullptr, m.hidden, m.inner}}};
    for (const Place& place : places)
      if (where == place.name) {
        fits(rows, columns, place.rows, place.columns);
        need(!add || place.bias, "only q, k and v may have a bias");
        *place.linear = linear;
        if (place.bias) *place.bias = add;
        return;
      }
    need(false, "there is no such linear");
  }
};

} // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Decoder>(m, "Decoder")
      .def(nb::init<i64, i64, i64, i64, i64, i64, i64, i64, float>())
      .def("shared", &Decoder::shared)
      .def("norms", &Decoder::norms)
      .def("dense", &Decoder::dense)
      .def("bitmask", &Decoder::bitmask)
      .def("grouped", &Decoder::grouped)
      .def("step", &Decoder::run);
}
