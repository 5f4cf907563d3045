// combine as a custom call: decode, check, launch.
#include "handlers/call_site.h"
#include "handlers/handlers.h"

namespace jax_deepep {
namespace {

LaunchResult Combine(CallSite* site, LaunchContext context, ffi::AnyBuffer rank, ffi::AnyBuffer,
                     ffi::AnyBuffer y, ffi::AnyBuffer destination, ffi::AnyBuffer weights,
                     ffi::AnyBuffer bias, ffi::AnyBuffer row_gradients, ffi::AnyBuffer pairs,
                     ffi::AnyBuffer group_sizes, ffi::AnyBuffer source, ffi::RemainingArgs others,
                     ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> gradients,
                     ffi::Result<ffi::AnyBuffer> sums, ffi::Result<ffi::AnyBuffer>, int64_t layout,
                     int64_t wire, bool weighted, bool with_bias, bool with_gradients,
                     bool with_pairs, bool with_source, bool with_sums, int64_t first_token,
                     int64_t out_tokens, bool with_into, SiteAttribute) {
  const GroupShape& shape = site->comm->shape();
  CombineParams params;
  RouteShape& route = params.route;
  route.layout = static_cast<Layout>(layout);
  route.num_tokens = static_cast<int32_t>(destination.element_count() / shape.num_topk);
  std::string error;
  RowFormat format;
  route.capacity = DecodeRows(y, "y", wire, shape, &format, &error);
  route.SetRows(format);
  if (format.type == RowType::kInt32 || format.type == RowType::kEncoded)
    error = "y: expected floats, got integers, which are not summed";

  CheckTokens(route.num_tokens, shape, &error);
  const int64_t entries = int64_t{route.num_tokens} * shape.num_topk;
  const int64_t capacity = route.capacity;
  const bool expert_major = route.layout == Layout::kExpertMajor;
  CheckBuffer(destination, ffi::S32, entries, "destination", &error);
  if (weighted) CheckBuffer(weights, ffi::F32, capacity, "weights", &error);
  if (with_bias) CheckRows(bias, y, out_tokens, "bias", &error);
  if (with_gradients) {
    CheckBuffer(row_gradients, ffi::F32, expert_major ? capacity : capacity * shape.num_topk,
                "row_gradients", &error);
    CheckBuffer(*gradients, ffi::F32, entries, "gradients", &error);
  }
  CheckBuffer(group_sizes, ffi::S32, NumRowGroups(shape, route), "group_sizes", &error);
  if (with_source) CheckBuffer(source, ffi::S32, capacity, "source", &error);
  CheckRows(*out, y, out_tokens, "out", &error);
  if (with_into && site->part != Part::kDone) {
    const auto into = others.get<ffi::AnyBuffer>(0);
    if (error.empty() && (!into || into->untyped_data() != out->untyped_data()))
      error = "into: expected the memory of out, got other memory";
  }
  if (with_pairs) {
    CheckBuffer(pairs, ffi::S32, PairTable(shape, route).ints(), "pairs", &error);
  }
  if (with_sums) {
    const CombineSums of_sums(shape, route);
    if (of_sums.has_plain_rows()) {
      CheckRows(*sums, y, of_sums.num_rows, "sums", &error);
    } else {
      CheckBuffer(*sums, ffi::S32, of_sums.bytes() / 4, "sums", &error);
    }
  }

  params.y = y.untyped_data();
  params.weights = DataIf<const float>(weighted, weights);
  params.row_gradients = DataIf<const float>(with_gradients, row_gradients);
  params.destination = static_cast<const int32_t*>(destination.untyped_data());
  if (with_bias) params.bias = RowsFrom(bias, first_token, route.num_tokens, "bias", &error);
  params.out = RowsFrom(*out, first_token, route.num_tokens, "out", &error);
  params.gradients = DataIf<float>(with_gradients, *gradients);
  params.pairs = DataIf<const int32_t>(with_pairs, pairs);
  params.group_sizes = static_cast<const int32_t*>(group_sizes.untyped_data());
  params.source = DataIf<const int32_t>(with_source, source);
  params.sums = DataIf<void>(with_sums, *sums);
  return Launch(site, context, rank, error, params);
}

}  // namespace

template <>
std::unique_ptr<ffi::Ffi> MakeHandler<CombineParams>(std::initializer_list<ffi::Traits> traits) {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<CallSite>>()
      .Ctx<LaunchContext>()
      .Arg<ffi::AnyBuffer>()  // rank
      .Arg<ffi::AnyBuffer>()  // after
      .Arg<ffi::AnyBuffer>()  // y
      .Arg<ffi::AnyBuffer>()  // destination
      .Arg<ffi::AnyBuffer>()  // weights, if weighted
      .Arg<ffi::AnyBuffer>()  // bias, if with_bias
      .Arg<ffi::AnyBuffer>()  // row_gradients, if with_gradients
      .Arg<ffi::AnyBuffer>()  // pairs, if with_pairs
      .Arg<ffi::AnyBuffer>()  // group_sizes
      .Arg<ffi::AnyBuffer>()  // source, if with_source
      .RemainingArgs()        // into, if with_into, or arrays in flight, if Part::kDone
      .Ret<ffi::AnyBuffer>()  // out
      .Ret<ffi::AnyBuffer>()  // gradients, if with_gradients
      .Ret<ffi::AnyBuffer>()  // sums, if with_sums
      .Ret<ffi::AnyBuffer>()  // ended
      .Attr<int64_t>("layout")
      .Attr<int64_t>("wire")
      .Attr<bool>("weighted")
      .Attr<bool>("with_bias")
      .Attr<bool>("with_gradients")
      .Attr<bool>("with_pairs")
      .Attr<bool>("with_source")
      .Attr<bool>("with_sums")
      .Attr<int64_t>("first_token")
      .Attr<int64_t>("out_tokens")
      .Attr<bool>("with_into")
      .Attr<SiteAttribute>("site")
      .To(Combine, traits);
}

}  // namespace jax_deepep
