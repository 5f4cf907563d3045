// cached_dispatch as a custom call: decode, check, launch.
#include "handlers/call_site.h"
#include "handlers/handlers.h"

namespace jax_deepep {
namespace {

LaunchResult CachedDispatch(
    CallSite* site, LaunchContext context, ffi::AnyBuffer rank, ffi::AnyBuffer, ffi::AnyBuffer x,
    ffi::AnyBuffer source, ffi::AnyBuffer destination, ffi::AnyBuffer group_sizes,
    ffi::AnyBuffer weights, ffi::AnyBuffer y, ffi::AnyBuffer pairs, ffi::RemainingArgs,
    ffi::Result<ffi::AnyBuffer> rows, ffi::Result<ffi::AnyBuffer> scales,
    ffi::Result<ffi::AnyBuffer> row_scale, ffi::Result<ffi::AnyBuffer> products,
    ffi::Result<ffi::AnyBuffer> encoded, ffi::Result<ffi::AnyBuffer>, int64_t layout, int64_t wire,
    bool keep_quantized, bool zero_rest, bool weighted, bool with_products, bool with_pairs,
    bool with_encoded, int64_t first_token, SiteAttribute) {
  const GroupShape& shape = site->comm->shape();
  CachedDispatchParams params;
  RouteShape& route = params.route;
  route.layout = static_cast<Layout>(layout);
  std::string error;
  RowFormat format;
  DecodeRows(x, "x", wire, shape, &format, &error);
  route.num_tokens = static_cast<int32_t>(destination.element_count() / shape.num_topk);
  CheckTokens(route.num_tokens, shape, &error);
  format.keeps_quantized = keep_quantized;
  route.SetRows(format);
  route.capacity = static_cast<int32_t>(source.element_count());
  params.zero_rest = zero_rest;

  const int64_t capacity = route.capacity;
  if ((weighted || with_products) && (format.type == RowType::kInt32 || keep_quantized)) {
    error = "x: expected floats with weights or y, got rows that are only copied";
  } else if (zero_rest && keep_quantized) {
    error = "zero_rest: expected false for rows that stay quantised, got true";
  }
  CheckBuffer(source, ffi::S32, capacity, "source", &error);
  CheckBuffer(destination, ffi::S32, int64_t{route.num_tokens} * shape.num_topk, "destination",
              &error);
  CheckBuffer(group_sizes, ffi::S32, NumRowGroups(shape, route), "group_sizes", &error);
  if (weighted) CheckBuffer(weights, ffi::F32, capacity, "weights", &error);
  if (with_products) {
    CheckRows(y, x, capacity, "y", &error);
    CheckBuffer(*products, ffi::F32, capacity, "products", &error);
  }
  if (keep_quantized) {
    params.kept = DecodeKept(*rows, *scales, *row_scale, format, capacity, &error);
  } else {
    CheckRows(*rows, x, capacity, "rows", &error);
  }
  if (with_pairs) {
    CheckBuffer(pairs, ffi::S32, PairTable(shape, route).ints(), "pairs", &error);
  }
  if (with_encoded) {
    CheckBuffer(*encoded, ffi::S32, route.num_tokens * format.wire_bytes() / 4, "encoded", &error);
  }

  params.x = RowsFrom(x, first_token, route.num_tokens, "x", &error);
  params.source = static_cast<const int32_t*>(source.untyped_data());
  params.destination = static_cast<const int32_t*>(destination.untyped_data());
  params.group_sizes = static_cast<const int32_t*>(group_sizes.untyped_data());
  params.pairs = DataIf<const int32_t>(with_pairs, pairs);
  params.weights = DataIf<const float>(weighted, weights);
  params.y = DataIf<const void>(with_products, y);
  params.rows = DataIf<void>(!keep_quantized, *rows);
  params.products = DataIf<float>(with_products, *products);
  params.encoded = DataIf<void>(with_encoded, *encoded);
  return Launch(site, context, rank, error, params);
}

}  // namespace

template <>
std::unique_ptr<ffi::Ffi> MakeHandler<CachedDispatchParams>(
    std::initializer_list<ffi::Traits> traits) {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<CallSite>>()
      .Ctx<LaunchContext>()
      .Arg<ffi::AnyBuffer>()  // rank
      .Arg<ffi::AnyBuffer>()  // after
      .Arg<ffi::AnyBuffer>()  // x
      .Arg<ffi::AnyBuffer>()  // source
      .Arg<ffi::AnyBuffer>()  // destination
      .Arg<ffi::AnyBuffer>()  // group_sizes
      .Arg<ffi::AnyBuffer>()  // weights, if weighted
      .Arg<ffi::AnyBuffer>()  // y, if with_products
      .Arg<ffi::AnyBuffer>()  // pairs, if with_pairs
      .RemainingArgs()        // arrays in flight, if Part::kDone
      .Ret<ffi::AnyBuffer>()  // rows, or their data
      .Ret<ffi::AnyBuffer>()  // scales, if keep_quantized
      .Ret<ffi::AnyBuffer>()  // row_scale, if the format has one
      .Ret<ffi::AnyBuffer>()  // products, if with_products
      .Ret<ffi::AnyBuffer>()  // encoded, if with_encoded
      .Ret<ffi::AnyBuffer>()  // ended
      .Attr<int64_t>("layout")
      .Attr<int64_t>("wire")
      .Attr<bool>("keep_quantized")
      .Attr<bool>("zero_rest")
      .Attr<bool>("weighted")
      .Attr<bool>("with_products")
      .Attr<bool>("with_pairs")
      .Attr<bool>("with_encoded")
      .Attr<int64_t>("first_token")
      .Attr<SiteAttribute>("site")
      .To(CachedDispatch, traits);
}

}  // namespace jax_deepep
