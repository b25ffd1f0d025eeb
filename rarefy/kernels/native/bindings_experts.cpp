// The experts of a mixture.
#include "bindings.hpp"
#include "mixture.hpp"

namespace nb = nanobind;
using namespace rarefy;
using Address = std::uintptr_t;

namespace {

// Assignments in the order of their experts, stable: those to nobody, which is expert number `experts`, come last.
void experts_sort(Address expert, Address item, Address weight, i64 count, i64 rows, i64 experts, Address to_expert, Address to_item, Address to_weight, Address end) {
  need(count >= 0 && rows >= 0 && experts > 0, "there are no experts, or counts below zero");
  need(item || (rows > 0 ? count % rows == 0 : count == 0), "without items, every row has as many assignments");
  i64* last = at<i64>(end, "end");
  std::fill(last, last + experts, i64(0));
  if (count == 0) return;
  const i64 *who = at<const i64>(expert, "expert"), *which = item ? at<const i64>(item, "item") : nullptr;
  const float* share = at<const float>(weight, "weight");
  i64 *out_who = at<i64>(to_expert, "to_expert"), *out_which = at<i64>(to_item, "to_item");
  float* out_share = at<float>(to_weight, "to_weight");
  const i64 k = which ? 0 : count / rows;
  for (i64 n = 0; n < count; n++) {
    need(who[n] >= 0 && who[n] <= experts, "an expert is not in 0 .. E");
    need(!which || (which[n] >= 0 && which[n] < rows), "an item is not a row of x");
    if (who[n] < experts) last[who[n]]++;
  }
  std::vector<i64> next(experts + 1);
  for (i64 e = 0, total = 0; e <= experts; e++) {
    next[e] = total;
    if (e < experts) total = last[e] += total;
  }
  for (i64 n = 0; n < count; n++) {
    const i64 to = next[who[n]]++;
    out_who[to] = who[n], out_which[to] = which ? which[n] : n / k, out_share[to] = share[n];
  }
}

void experts_linear(Address weight, Address bias, i64 experts, i64 rows, i64 columns, Address x, i64 given, Address item, Address end, i64 count, Address y, int threads) {
  shape(rows, columns);
  need(experts > 0 && experts < (i64(1) << 31) && given >= 0 && count >= 0, "there are no experts, or counts below zero");
  const Experts w{at<const float>(weight, "weight"), bias ? at<const float>(bias, "bias") : nullptr, experts, rows, columns};
  if (count == 0) return;
  const Sorted sorted{item ? at<const i64>(item, "item") : nullptr, at<const i64>(end, "end")};
  for (i64 e = 0, before = 0; e < experts; before = sorted.end[e++]) need(sorted.end[e] >= before, "the ends of the experts do not ascend");
  const i64 assigned = sorted.assigned(experts);
  need(assigned <= count && (item || count <= given), "an expert ends past the last assignment, or an assignment is past the rows of x");
  for (i64 n = 0; sorted.item && n < assigned; n++) need(sorted.item[n] >= 0 && sorted.item[n] < given, "an item is not a row of x");
  float* out = at<float>(y, "y");
  const float* in = assigned ? at<const float>(x, "x") : nullptr;
  nb::gil_scoped_release release;
  multiply(*in_use(), w, in, sorted, out, threads);
  std::fill(out + assigned * rows, out + count * rows, 0.0f);
}

void experts_combine(Address y, i64 assigned, i64 columns, Address item, Address weight, Address out, i64 rows, int threads) {
  need(assigned >= 0 && rows >= 0 && columns > 0, "counts are not negative, and there are columns");
  if (rows == 0) return need(assigned == 0, "an item is not a row of x");
  const float *in = assigned ? at<const float>(y, "y") : nullptr, *share = assigned ? at<const float>(weight, "weight") : nullptr;
  const i64* which = assigned ? at<const i64>(item, "item") : nullptr;
  for (i64 n = 0; n < assigned; n++) need(which[n] >= 0 && which[n] < rows, "an item is not a row of x");
  float* to = at<float>(out, "out");
  nb::gil_scoped_release release;
  combine(*in_use(), in, assigned, columns, which, share, to, rows, threads);
}

} // namespace

void bind_experts(nb::module_& m) {
  m.def("experts_sort", &experts_sort);
  m.def("experts_linear", &experts_linear);
  m.def("experts_combine", &experts_combine);
}
