// The product as an XLA custom call, and what the Python loader asks. Headers: third_party/xla.
#include <string>
#include <string_view>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace mesh_transformer {
namespace {

std::atomic<const Path*> chosen{nullptr};

ffi::Error wrong(const std::string& what) { return ffi::Error::InvalidArgument("mesh_transformer native matmul: " + what); }

ffi::Error multiply_buffers(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w,
                            ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs rest, ffi::ResultBuffer<ffi::F32> out) {
  const Path* path = chosen.load();
  if (!path) return wrong("no path was chosen");
  if (x.dimensions().size() != 2 || w.dimensions().size() != 3 || out->dimensions().size() != 2 ||
      layer.element_count() != 1)
    return wrong("expected x [rows, inner], w [layers, inner, columns] and a scalar layer");
  Problem p = {};
  p.rows = x.dimensions()[0];
  p.inner = x.dimensions()[1];
  p.columns = w.dimensions()[2];
  size_t stored = p.inner;
  switch (w.element_type()) {
    case ffi::F32: p.kind = Kind::kFloat32; break;
    case ffi::BF16: p.kind = Kind::kBFloat16; break;
    case ffi::F16: p.kind = Kind::kFloat16; break;
    case ffi::S8: p.kind = Kind::kInt8; break;
    case ffi::U8: p.kind = Kind::kInt4; stored = p.inner / 2; break;
    default: return wrong("this type of weights is not known");
  }
  const int64_t layers = w.dimensions()[0], index = layer.typed_data()[0];
  if (index < 0 || index >= layers)
    return wrong("layer " + std::to_string(index) + " of " + std::to_string(layers));
  if (static_cast<size_t>(w.dimensions()[1]) != stored || static_cast<size_t>(out->dimensions()[0]) != p.rows ||
      static_cast<size_t>(out->dimensions()[1]) != p.columns)
    return wrong("shapes do not fit together");
  const size_t one_layer = w.size_bytes() / layers;
  p.x = x.typed_data();
  p.w = static_cast<const char*>(w.untyped_data()) + index * one_layer;
  p.out = out->typed_data();
  if (p.kind == Kind::kInt8 || p.kind == Kind::kInt4) {
    auto scale = rest.get<ffi::AnyBuffer>(0);
    if (!scale) return wrong("weights of this type need a scale");
    if (scale->dimensions().size() == 0 || scale->dimensions()[0] != layers) return wrong("the scale has other layers");
    const size_t elements = scale->element_count() / layers;
    if (p.kind == Kind::kInt8 && (scale->element_type() != ffi::F32 || elements != p.columns))
      return wrong("int8 needs a float32 scale for every column");
    if (p.kind == Kind::kInt4) {
      const size_t groups = p.columns ? elements / p.columns : 0;
      if (scale->element_type() != ffi::F16 || (p.inner && (!groups || p.inner % groups || p.inner / groups % 2)))
        return wrong("int4 needs float16 scales for groups of an even number of rows");
      p.group = groups ? p.inner / groups : 2;
    }
    p.scale = static_cast<const char*>(scale->untyped_data()) + index * (scale->size_bytes() / layers);
  }
  multiply(p, *path, pool.num_threads(), [&](std::function<void()> task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace mesh_transformer

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* mesh_transformer_matmul(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(mesh_transformer_matmul, mesh_transformer::multiply_buffers,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>());

// Chooses the path of this name, or the best for null. Its name, or null if it is not here.
extern "C" __attribute__((visibility("default"))) const char* mesh_transformer_choose(const char* name) {
  const auto* path = mesh_transformer::choose(name);
  if (!path) return nullptr;
  mesh_transformer::chosen.store(path);
  return path->name;
}
