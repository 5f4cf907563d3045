// The row baselines as custom calls: decode, check, launch.
#include "bench/row_handlers.h"

#include <cstdint>
#include <initializer_list>
#include <string>

#include "bench/row_baselines.h"
#include "bindings/op_launcher.h"
#include "handlers/call_site.h"
#include "interface/op_signature.h"

namespace jax_deepep {
namespace {

enum class Baseline : uint64_t { kGather = 1, kAdd = 2, kSum = 3 };

using LaunchBaseline = const char* (*)(const OpFrame&, const BaselineParams&, int,
                                       const DeviceFacts&, const KernelStream&);

// The common parameters: rows, and the table of pairs.
BaselineParams ParamsOf(const GroupShape& shape, int64_t layout, int64_t num_tokens,
                        int64_t capacity, const ffi::AnyBuffer& pairs, std::string* error) {
  BaselineParams params;
  RouteShape& route = params.route;
  route.layout = static_cast<Layout>(layout);
  route.row_type = RowType::kBFloat16;
  route.row_size = shape.hidden_size;
  route.num_tokens = static_cast<int32_t>(num_tokens);
  route.capacity = static_cast<int32_t>(capacity);
  const bool expert_major = route.layout == Layout::kExpertMajor;
  params.max_rows = expert_major ? PairTable(shape, route).max_rows : 1;
  params.pairs = static_cast<const int32_t*>(pairs.untyped_data());
  if (pairs.dimensions().size() != 2 || pairs.element_type() != ffi::S32 ||
      pairs.dimensions()[1] <= params.max_rows) {
    *error = "pairs: expected a table of int32 with a line for each pair";
    return params;
  }
  params.line_ints = static_cast<int32_t>(pairs.dimensions()[1]);
  if (shape.hidden_size % 8 != 0) *error = "hidden_size: expected a multiple of 8";
  if (shape.num_topk > kMaxBaselineRows) *error = "num_experts_per_tok: expected at most 8";
  return params;
}

// As for the op that is compared with it, so that both take as many SMs.
OpBytes BytesOf(const GroupShape& shape, Baseline kind, const BaselineParams& params) {
  const ExpectedRows rows = ExpectedRowsOf(shape, params.route);
  const double local_rows = kind == Baseline::kSum
                                ? VerbTraits<CombineParams>::LocalRows(CombineParams(), rows)
                                : (kind == Baseline::kAdd ? 2 : 1) * rows.rows;
  return BytesOf(shape, params.route, local_rows);
}

ffi::Error Run(CallSite* site, LaunchContext& context, const ffi::AnyBuffer& rank,
               std::string error, Baseline kind, const BaselineParams& params,
               std::initializer_list<PeerArray> read_by_peers, LaunchBaseline launch) {
  // In bits of the flags above that of a mode: the communicator would take it for one.
  const auto variant =
      static_cast<int64_t>((static_cast<int32_t>(kind) * 256 + params.warps) * 256 + params.depth) *
      2 * OpSignature::kLowLatency;
  const OpSignature op(Verb::kBaseline, site->call, variant, params.route);
  if (error.empty()) {
    error = launch_op(*site->comm, op, BytesOf(site->comm->shape(), kind, params), read_by_peers,
                      context.op_launch(site, rank),
                      [&](const OpFrame& frame, int num_blocks, const DeviceFacts& facts,
                          const KernelStream& stream) {
                        return launch(frame, params, num_blocks, facts, stream);
                      });
  }
  if (error.empty()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition, "jax_deepep row baseline: " + error);
}

ffi::Error GatherRows(CallSite* site, LaunchContext context, ffi::AnyBuffer rank, ffi::AnyBuffer x,
                      ffi::AnyBuffer pairs, ffi::Result<ffi::AnyBuffer> rows, int64_t layout,
                      int64_t warps, int64_t depth, SiteAttribute) {
  const GroupShape& shape = site->comm->shape();
  const int64_t num_tokens = x.element_count() / shape.hidden_size;
  const int64_t capacity = rows->element_count() / shape.hidden_size;
  std::string error;
  BaselineParams params = ParamsOf(shape, layout, num_tokens, capacity, pairs, &error);
  CheckBuffer(x, ffi::BF16, num_tokens * shape.hidden_size, "x", &error);
  CheckBuffer(*rows, ffi::BF16, capacity * shape.hidden_size, "rows", &error);
  params.x = x.untyped_data();
  params.out = rows->untyped_data();
  params.warps = static_cast<int32_t>(warps);
  params.depth = static_cast<int32_t>(depth);
  return Run(site, context, rank, error, Baseline::kGather, params,
             {{&params.x, params.route.num_tokens * params.route.rows().bytes()}},
             &LaunchGatherRows);
}

ffi::Error AddRows(CallSite* site, LaunchContext context, ffi::AnyBuffer rank, ffi::AnyBuffer x,
                   ffi::AnyBuffer y, ffi::AnyBuffer pairs, ffi::Result<ffi::AnyBuffer> rows,
                   int64_t layout, SiteAttribute) {
  const GroupShape& shape = site->comm->shape();
  const int64_t num_tokens = x.element_count() / shape.hidden_size;
  const int64_t capacity = rows->element_count() / shape.hidden_size;
  std::string error;
  BaselineParams params = ParamsOf(shape, layout, num_tokens, capacity, pairs, &error);
  CheckBuffer(x, ffi::BF16, num_tokens * shape.hidden_size, "x", &error);
  CheckBuffer(y, ffi::BF16, capacity * shape.hidden_size, "y", &error);
  CheckBuffer(*rows, ffi::BF16, capacity * shape.hidden_size, "rows", &error);
  params.x = x.untyped_data();
  params.y = y.untyped_data();
  params.out = rows->untyped_data();
  return Run(site, context, rank, error, Baseline::kAdd, params,
             {{&params.x, params.route.num_tokens * params.route.rows().bytes()}}, &LaunchAddRows);
}

ffi::Error SumRows(CallSite* site, LaunchContext context, ffi::AnyBuffer rank, ffi::AnyBuffer y,
                   ffi::AnyBuffer pairs, ffi::AnyBuffer inputs, ffi::Result<ffi::AnyBuffer> out,
                   ffi::Result<ffi::AnyBuffer> sums, int64_t layout, bool with_sums,
                   SiteAttribute) {
  const GroupShape& shape = site->comm->shape();
  const int64_t num_tokens = out->element_count() / shape.hidden_size;
  const int64_t capacity = y.element_count() / shape.hidden_size;
  std::string error;
  BaselineParams params = ParamsOf(shape, layout, num_tokens, capacity, pairs, &error);
  CheckBuffer(y, ffi::BF16, capacity * shape.hidden_size, "y", &error);
  CheckBuffer(inputs, ffi::S32, num_tokens * shape.num_topk, "inputs", &error);
  CheckBuffer(*out, ffi::BF16, num_tokens * shape.hidden_size, "out", &error);
  if (with_sums) {
    const int64_t rows = int64_t{shape.num_ranks} * shape.max_tokens;
    CheckBuffer(*sums, ffi::BF16, rows * shape.hidden_size, "sums", &error);
  }
  params.y = y.untyped_data();
  params.inputs = static_cast<const int32_t*>(inputs.untyped_data());
  params.out = out->untyped_data();
  params.sums = DataIf<void>(with_sums, *sums);
  return Run(site, context, rank, error, Baseline::kSum, params,
             {{&params.y, params.route.capacity * params.route.rows().bytes()}, params.sums},
             &LaunchSumRows);
}

}  // namespace

OpLauncher launch_op = nullptr;

XLA_FFI_DEFINE_HANDLER_SYMBOL(GatherRowsHandler, GatherRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::State<CallSite>>()
                                  .Ctx<LaunchContext>()
                                  .Arg<ffi::AnyBuffer>()  // rank
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // pairs
                                  .Ret<ffi::AnyBuffer>()  // rows
                                  .Attr<int64_t>("layout")
                                  .Attr<int64_t>("warps")
                                  .Attr<int64_t>("depth")
                                  .Attr<SiteAttribute>("site"),
                              kTraits);

XLA_FFI_DEFINE_HANDLER_SYMBOL(AddRowsHandler, AddRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::State<CallSite>>()
                                  .Ctx<LaunchContext>()
                                  .Arg<ffi::AnyBuffer>()  // rank
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // y
                                  .Arg<ffi::AnyBuffer>()  // pairs
                                  .Ret<ffi::AnyBuffer>()  // rows
                                  .Attr<int64_t>("layout")
                                  .Attr<SiteAttribute>("site"),
                              kTraits);

XLA_FFI_DEFINE_HANDLER_SYMBOL(SumRowsHandler, SumRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::State<CallSite>>()
                                  .Ctx<LaunchContext>()
                                  .Arg<ffi::AnyBuffer>()  // rank
                                  .Arg<ffi::AnyBuffer>()  // y
                                  .Arg<ffi::AnyBuffer>()  // pairs
                                  .Arg<ffi::AnyBuffer>()  // inputs
                                  .Ret<ffi::AnyBuffer>()  // out
                                  .Ret<ffi::AnyBuffer>()  // sums, if with_sums
                                  .Attr<int64_t>("layout")
                                  .Attr<bool>("with_sums")
                                  .Attr<SiteAttribute>("site"),
                              kTraits);

}  // namespace jax_deepep
