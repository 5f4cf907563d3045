#include "handlers/call_site.h"

#include <mutex>
#include <optional>
#include <sstream>

#include "handlers/handlers.h"
#include "handlers/registry.h"

namespace jax_deepep {

ffi::TypeId CallSite::id = {};
const XLA_FFI_TypeInfo CallSite::info = ffi::MakeTypeInfo<CallSite>();

namespace {

// The program that is being compiled. XLA instantiates the calls of one program in the order of its
// thunks, which is the same wherever the same program is compiled; the thread differs between
// versions of XLA. Python serialises compilations.
std::mutex program_mutex;
std::shared_ptr<ProgramCalls> program = std::make_shared<ProgramCalls>(false);

// Empty for a type that rows cannot have. Integers are only copied, so their width does not matter.
std::optional<RowType> RowTypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::F32:
      return RowType::kFloat32;
    case ffi::F16:
      return RowType::kFloat16;
    case ffi::BF16:
      return RowType::kBFloat16;
    case ffi::S8:
    case ffi::U8:
    case ffi::S16:
    case ffi::U16:
    case ffi::S32:
    case ffi::U32:
      return RowType::kInt32;
    default:
      return std::nullopt;
  }
}

}  // namespace

void BeginProgram(bool on_main_thread) {
  std::lock_guard<std::mutex> lock(program_mutex);
  program = std::make_shared<ProgramCalls>(on_main_thread);
}

namespace {

// The instantiate stage of every verb.
ffi::ErrorOr<std::unique_ptr<CallSite>> InstantiateCallSite(ffi::RemainingArgs, ffi::RemainingRets,
                                                            ffi::Dictionary attributes) {
  const ffi::ErrorOr<SiteAttribute> attribute = attributes.get<SiteAttribute>("site");
  if (!attribute.has_value()) return ffi::Unexpected(attribute.error());
  if (attribute->size() != 6) {
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kInvalidArgument,
                                      "jax_deepep: expected 6 integers in the attribute \"site\""));
  }
  const int64_t *values = attribute->begin(), comm_id = values[0], fingerprint = values[1];
  auto site = std::make_unique<CallSite>();
  site->call = values[2];
  site->mode = static_cast<Mode>(values[3]);
  site->channel = static_cast<int32_t>(values[4]);
  site->part = static_cast<Part>(values[5]);
  {
    std::lock_guard<std::mutex> lock(program_mutex);
    site->number = program->count++;
    site->program = program;
  }
  std::string unsupported_reason;
  site->comm = FindCommunicator<PlatformCommunicator>(comm_id, fingerprint, &unsupported_reason);
  if (site->comm == nullptr) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kFailedPrecondition, "jax_deepep: " + unsupported_reason));
  }
  return site;
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(InstantiateHandler, InstantiateCallSite,
                              ffi::Ffi::BindInstantiate().RemainingArgs().RemainingRets().Attrs());

int32_t DecodeRows(const ffi::AnyBuffer& rows, const char* name, int64_t wire,
                   const GroupShape& shape, RowFormat* format, std::string* error) {
  const std::optional<RowType> type = RowTypeOf(rows.element_type());
  const auto dimensions = rows.dimensions();
  std::ostringstream text;
  if (!type || dimensions.size() != 2 || dimensions[1] == 0) {
    text << name << ": expected 2 dimensions of floats, or of integers of up to 32 bits, got "
         << dimensions.size() << " of " << rows.element_type();
    *error = text.str();
    return 0;
  }
  const int64_t row_bytes =
      dimensions[1] * static_cast<int64_t>(ffi::ByteWidth(rows.element_type()));
  format->type = *type;
  format->size = static_cast<int32_t>(row_bytes / static_cast<int64_t>(BytesOf(*type)));
  if (wire < 0 || wire >= kNumWireFormats) {
    text << "wire: expected 0 to " << kNumWireFormats - 1 << ", got " << wire;
  } else if (wire != 0) {
    format->wire = static_cast<WireFormat>(wire);
  }
  if (*type == RowType::kInt32 && format->is_quantized()) {
    format->type = RowType::kEncoded;
    format->size = shape.hidden_size;
    format->keeps_quantized = true;
    if (rows.element_type() != ffi::U8 || row_bytes != format->bytes()) {
      text << name << ": expected rows of " << format->bytes() << " U8 in the format "
           << kWireNames[wire] << ", got " << dimensions[1] << " of " << rows.element_type();
    }
  } else if (*type == RowType::kInt32) {
    if (row_bytes % kPayloadAlignment != 0 || row_bytes > shape.max_row_bytes()) {
      text << name << ": expected rows of integers of a multiple of " << kPayloadAlignment
           << " bytes up to " << shape.max_row_bytes() << ", got " << row_bytes;
    }
  } else if (dimensions[1] > shape.hidden_size) {
    text << name << ": expected rows of at most " << shape.hidden_size << " floats, got "
         << dimensions[1];
  }
  if (error->empty()) *error = text.str();
  return static_cast<int32_t>(dimensions[0]);
}

void CheckTokens(int64_t num_tokens, const GroupShape& shape, std::string* error) {
  if (!error->empty() || num_tokens <= shape.max_tokens) return;
  *error = "tokens: expected at most max_tokens=" + std::to_string(shape.max_tokens) + ", got " +
           std::to_string(num_tokens);
}

void CheckBuffer(const ffi::AnyBuffer& buffer, ffi::DataType type, int64_t count, const char* name,
                 std::string* error) {
  const auto got = static_cast<int64_t>(buffer.element_count());
  if (!error->empty() || (buffer.element_type() == type && got == count)) return;
  std::ostringstream text;
  text << name << ": expected " << count << " elements of " << type << ", got " << got << " of "
       << buffer.element_type();
  *error = text.str();
}

void CheckRows(const ffi::AnyBuffer& buffer, const ffi::AnyBuffer& rows, int64_t count,
               const char* name, std::string* error) {
  if (!error->empty()) return;  // `rows` may be invalid
  CheckBuffer(buffer, rows.element_type(), count * rows.dimensions()[1], name, error);
}

void* RowsFrom(const ffi::AnyBuffer& rows, int64_t first_token, int64_t count, const char* name,
               std::string* error) {
  if (!error->empty()) return nullptr;  // `rows` may be invalid
  const int64_t got = rows.dimensions()[0];
  if (first_token < 0) {
    *error = "first_token: expected at least 0, got " + std::to_string(first_token);
  } else if (first_token > got - count) {
    *error = std::string(name) + ": expected " + std::to_string(count) +
             " rows from first_token=" + std::to_string(first_token) + " on, got " +
             std::to_string(got) + " in all";
  }
  if (!error->empty()) return nullptr;
  const auto element_bytes = static_cast<int64_t>(ffi::ByteWidth(rows.element_type()));
  return static_cast<char*>(rows.untyped_data()) +
         first_token * rows.dimensions()[1] * element_bytes;
}

KeptArrays DecodeKept(const ffi::AnyBuffer& data, const ffi::AnyBuffer& scales,
                      const ffi::AnyBuffer& row_scale, const RowFormat& rows, int64_t count,
                      std::string* error) {
  const WireRow wire = rows.wire_row();
  if (error->empty() && !rows.is_quantized()) *error = "wire: expected a format of kept rows";
  CheckBuffer(data, ffi::U8, count * wire.data_bytes(), "data", error);
  CheckBuffer(scales, rows.wire == WireFormat::kFp8 ? ffi::F32 : ffi::U8, count * wire.num_blocks(),
              "scales", error);
  const bool has_row_scale = wire.row_scale_bytes() > 0;
  if (has_row_scale) CheckBuffer(row_scale, ffi::F32, count, "row_scale", error);
  return {data.untyped_data(), scales.untyped_data(), DataIf<void>(has_row_scale, row_scale)};
}

}  // namespace jax_deepep
