// dispatch as a custom call: decode, check, launch.
#include "handlers/call_site.h"
#include "handlers/handlers.h"

namespace jax_deepep {
namespace {

LaunchResult Dispatch(
    CallSite* site, LaunchContext context, ffi::AnyBuffer rank, ffi::AnyBuffer, ffi::AnyBuffer x,
    ffi::AnyBuffer topk_idx, ffi::AnyBuffer topk_weights, ffi::RemainingArgs,
    ffi::Result<ffi::AnyBuffer> tokens, ffi::Result<ffi::AnyBuffer> scales,
    ffi::Result<ffi::AnyBuffer> row_scale, ffi::Result<ffi::AnyBuffer> source,
    ffi::Result<ffi::AnyBuffer> destination, ffi::Result<ffi::AnyBuffer> weights,
    ffi::Result<ffi::AnyBuffer> local_experts, ffi::Result<ffi::AnyBuffer> group_sizes,
    ffi::Result<ffi::AnyBuffer> num_rows, ffi::Result<ffi::AnyBuffer> num_received,
    ffi::Result<ffi::AnyBuffer> num_dropped, ffi::Result<ffi::AnyBuffer> num_invalid,
    ffi::Result<ffi::AnyBuffer> pairs, ffi::Result<ffi::AnyBuffer> scratch,
    ffi::Result<ffi::AnyBuffer> encoded, ffi::Result<ffi::AnyBuffer>, int64_t layout, int64_t wire,
    bool keep_quantized, int64_t alignment, int64_t expert_capacity, bool with_pairs,
    bool with_scratch, bool with_encoded, int64_t first_token, SiteAttribute) {
  const GroupShape& shape = site->comm->shape();
  DispatchParams params;
  RouteShape& route = params.route;
  route.layout = static_cast<Layout>(layout);
  std::string error;
  RowFormat format;
  DecodeRows(x, "x", wire, shape, &format, &error);
  route.num_tokens = static_cast<int32_t>(topk_idx.element_count() / shape.num_topk);
  CheckTokens(route.num_tokens, shape, &error);
  format.keeps_quantized = keep_quantized;
  route.SetRows(format);
  route.capacity = static_cast<int32_t>(source->element_count());
  route.alignment = static_cast<int32_t>(alignment);
  route.expert_capacity = expert_capacity;

  const int64_t entries = int64_t{route.num_tokens} * shape.num_topk;
  const int64_t capacity = route.capacity, num_groups = NumRowGroups(shape, route);
  const bool expert_major = route.layout == Layout::kExpertMajor;
  CheckBuffer(topk_idx, ffi::S32, entries, "topk_idx", &error);
  CheckBuffer(topk_weights, ffi::F32, entries, "topk_weights", &error);
  if (keep_quantized) {
    params.kept = DecodeKept(*tokens, *scales, *row_scale, format, capacity, &error);
  } else {
    CheckRows(*tokens, x, capacity, "tokens", &error);
  }
  CheckBuffer(*destination, ffi::S32, entries, "destination", &error);
  CheckBuffer(*weights, ffi::F32, expert_major ? capacity : capacity * shape.num_topk, "weights",
              &error);
  if (!expert_major) {
    CheckBuffer(*local_experts, ffi::S32, capacity * shape.num_topk, "local_experts", &error);
  }
  CheckBuffer(*group_sizes, ffi::S32, num_groups, "group_sizes", &error);
  CheckBuffer(*num_rows, ffi::S32, num_groups, "num_rows", &error);
  if (with_pairs) {
    CheckBuffer(*pairs, ffi::S32, PairTable(shape, route).ints(), "pairs", &error);
  }
  if (with_scratch) {
    CheckBuffer(*scratch, ffi::S32, DispatchScratchInts(shape, route), "scratch", &error);
  }
  if (with_encoded) {
    CheckBuffer(*encoded, ffi::S32, route.num_tokens * format.wire_bytes() / 4, "encoded", &error);
  }

  params.x = RowsFrom(x, first_token, route.num_tokens, "x", &error);
  params.topk_idx = static_cast<const int32_t*>(topk_idx.untyped_data());
  params.topk_weights = static_cast<const float*>(topk_weights.untyped_data());
  params.tokens = DataIf<void>(!keep_quantized, *tokens);
  params.source = static_cast<int32_t*>(source->untyped_data());
  params.destination = static_cast<int32_t*>(destination->untyped_data());
  params.weights = static_cast<float*>(weights->untyped_data());
  params.local_experts = DataIf<int32_t>(!expert_major, *local_experts);
  params.group_sizes = static_cast<int32_t*>(group_sizes->untyped_data());
  params.num_rows = static_cast<int32_t*>(num_rows->untyped_data());
  params.num_received = static_cast<int32_t*>(num_received->untyped_data());
  params.num_dropped = static_cast<int32_t*>(num_dropped->untyped_data());
  params.num_invalid = static_cast<int32_t*>(num_invalid->untyped_data());
  params.pairs = DataIf<int32_t>(with_pairs, *pairs);
  params.scratch = DataIf<int32_t>(with_scratch, *scratch);
  params.encoded = DataIf<void>(with_encoded, *encoded);
  return Launch(site, context, rank, error, params);
}

}  // namespace

template <>
std::unique_ptr<ffi::Ffi> MakeHandler<DispatchParams>(std::initializer_list<ffi::Traits> traits) {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<CallSite>>()
      .Ctx<LaunchContext>()
      .Arg<ffi::AnyBuffer>()  // rank
      .Arg<ffi::AnyBuffer>()  // after
      .Arg<ffi::AnyBuffer>()  // x
      .Arg<ffi::AnyBuffer>()  // topk_idx
      .Arg<ffi::AnyBuffer>()  // topk_weights
      .RemainingArgs()        // arrays in flight, if Part::kDone
      .Ret<ffi::AnyBuffer>()  // tokens, or their data
      .Ret<ffi::AnyBuffer>()  // scales, if keep_quantized
      .Ret<ffi::AnyBuffer>()  // row_scale, if the format has one
      .Ret<ffi::AnyBuffer>()  // source
      .Ret<ffi::AnyBuffer>()  // destination
      .Ret<ffi::AnyBuffer>()  // weights
      .Ret<ffi::AnyBuffer>()  // local_experts, if token-major
      .Ret<ffi::AnyBuffer>()  // group_sizes
      .Ret<ffi::AnyBuffer>()  // num_rows
      .Ret<ffi::AnyBuffer>()  // num_received
      .Ret<ffi::AnyBuffer>()  // num_dropped
      .Ret<ffi::AnyBuffer>()  // num_invalid
      .Ret<ffi::AnyBuffer>()  // pairs, if with_pairs
      .Ret<ffi::AnyBuffer>()  // scratch, if with_scratch
      .Ret<ffi::AnyBuffer>()  // encoded, if with_encoded
      .Ret<ffi::AnyBuffer>()  // ended
      .Attr<int64_t>("layout")
      .Attr<int64_t>("wire")
      .Attr<bool>("keep_quantized")
      .Attr<int64_t>("alignment")
      .Attr<int64_t>("expert_capacity")
      .Attr<bool>("with_pairs")
      .Attr<bool>("with_scratch")
      .Attr<bool>("with_encoded")
      .Attr<int64_t>("first_token")
      .Attr<SiteAttribute>("site")
      .To(Dispatch, traits);
}

}  // namespace jax_deepep
