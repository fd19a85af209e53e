// A pretend accelerator: the device type `hpu` without hardware, for tests on machines that have no GPU.
//
// Its tensors are real, separate memory. Every operator runs through the CPU's own kernels, over the same bytes and
// strides, so its results are the CPU's bit for bit. What a real accelerator would refuse, this one refuses too:
// operators that mix devices, and allocations above a cap. Bytes that cross between host and device are counted.
//
// `hpu`, because only a few device types are "shallow-copy compatible" with the CPU, that is, accept
// `parameter.data = tensor_on_the_other_device` as CUDA does; torch's device type for out-of-tree backends is not one.
//
// It has no streams and no events, so it shows no race between them and runs no backward pass: copies are synchronous.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "device_memory.h"

namespace {

using at::Tensor;
using pretend::kDevice;
using pretend::memory;

const c10::DispatchKeySet kKeys(c10::DispatchKey::HPU);

Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, c10::ScalarType dtype) {
  return at::detail::empty_strided_generic(sizes, strides, &memory(), kKeys, dtype);
}

// ---------------------------------------------------------------------------------------------------- copies, counted

struct Traffic {
  std::atomic<int64_t> bytes{0}, copies{0};
  void add(int64_t size) { bytes += size, ++copies; }
  void reset() { bytes = copies = 0; }
};
Traffic host_to_device, device_to_host, device_to_device;

// -------------------------------------------------------------------------------- device tensors, lent to CPU kernels

// Lends the bytes of device tensors to the CPU for the duration of one operator, and takes back what it made of them.
class Loan {
 public:
  // A CPU tensor over the same bytes. A shared storage stays shared, for the CPU's checks of overlapping memory.
  Tensor lend(const Tensor& tensor) {
    Tensor lent = at::detail::make_tensor<c10::TensorImpl>(
        lend(tensor.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    lent.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    lent._set_conj(tensor.is_conj());
    lent._set_neg(tensor.is_neg());
    tensors_.push_back({tensor, lent});
    return lent;
  }

  // Carries a resize (by `resize_` or an `out=` argument) over to the device: new memory, then the new shape.
  void settle() {
    for (auto& [original, lent, address] : storages_) {
      if (lent.data() == address) continue;
      c10::DataPtr grown = memory().allocate(lent.nbytes());
      std::memcpy(grown.get(), lent.data(), lent.nbytes());
      original.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(grown));
      original.unsafeGetStorageImpl()->set_nbytes(lent.nbytes());
    }
    for (auto& [original, lent] : tensors_) {
      if (original.sizes() == lent.sizes() && original.strides() == lent.strides()) continue;
      original.unsafeGetTensorImpl()->set_sizes_and_strides(lent.sizes(), lent.strides(), lent.storage_offset());
    }
  }

  // The device tensor for a CPU result: an argument (in-place), a view of one, or a new tensor.
  Tensor take_back(const Tensor& result) const {
    if (!result.defined()) return result;
    for (const auto& [original, lent] : tensors_)
      if (lent.is_same(result)) return original;
    for (const auto& [original, lent] : tensors_)
      if (lent.storage().is_alias_of(result.storage())) return view_of(original, result);
    Tensor made = empty_strided(result.sizes(), result.strides(), result.scalar_type());
    if (made.numel() > 0) std::memcpy(made.mutable_data_ptr(), result.const_data_ptr(), made.storage().nbytes());
    return made;
  }

 private:
  struct LentStorage { c10::Storage original, lent; const void* address; };
  struct LentTensor { Tensor original, lent; };

  c10::Storage lend(const c10::Storage& storage) {
    for (const auto& known : storages_)
      if (known.original.is_alias_of(storage)) return known.lent;
    c10::DataPtr borrowed(storage.mutable_data(), c10::Device(c10::kCPU));  // without a deleter: the original owns it
    c10::Storage lent(c10::Storage::use_byte_size_t{}, storage.nbytes(), std::move(borrowed),
                      c10::GetAllocator(c10::kCPU), /*resizable=*/true);
    storages_.push_back({storage, lent, storage.data()});
    return lent;
  }

  static Tensor view_of(const Tensor& base, const Tensor& shape) {
    Tensor view = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), shape.dtype());
    view.unsafeGetTensorImpl()->set_sizes_and_strides(shape.sizes(), shape.strides(), shape.storage_offset());
    return view;
  }

  std::vector<LentStorage> storages_;
  std::vector<LentTensor> tensors_;
};

Tensor lend_if_on_device(Loan& loan, const Tensor& tensor) {
  return tensor.defined() && tensor.device() == kDevice ? loan.lend(tensor) : tensor;
}

// ------------------------------------------------------------------------------------- every operator, through the CPU

// Raises for a tensor on another device. As on CUDA, a number in a 0-dim CPU tensor may be read, but not written.
void check_device(const Tensor& tensor, const c10::Argument& argument, const c10::FunctionSchema& schema) {
  const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
  if (!tensor.defined() || tensor.device() == kDevice || (tensor.is_cpu() && tensor.dim() == 0 && !written)) return;
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but ", c10::toString(schema.operator_name()),
              " got `", argument.name(), "` of shape ", tensor.sizes(), " on ", tensor.device(),
              " beside tensors on ", kDevice);
}

c10::IValue lend_argument(Loan& loan, const c10::IValue& value, const c10::Argument& argument,
                          const c10::FunctionSchema& schema) {
  const auto checked = [&](const Tensor& tensor) {
    check_device(tensor, argument, schema);
    return lend_if_on_device(loan, tensor);
  };
  if (value.isTensor()) return checked(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> lent;
    for (const Tensor& tensor : value.toTensorVector()) lent.push_back(checked(tensor));
    return lent;
  }
  if (value.isOptionalTensorList()) {  // only `indices` of the index family: CUDA moves these over by itself
    c10::List<std::optional<Tensor>> lent;
    for (const std::optional<Tensor>& index : value.toOptionalTensorVector()) {
      if (index && index->defined() && index->is_cpu()) host_to_device.add(index->nbytes());
      lent.push_back(index ? std::optional<Tensor>(lend_if_on_device(loan, *index)) : std::nullopt);
    }
    return lent;
  }
  if (value.isDevice() && value.toDevice().type() == kDevice.type()) return c10::Device(c10::kCPU);
  return value;
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  // Autograd and autocast have had their turn on the device tensors; the CPU kernels must not see a second one.
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard below_autocast(c10::autocast_dispatch_keyset);
  const c10::FunctionSchema& schema = op.schema();
  const size_t arguments = schema.arguments().size(), returns = schema.returns().size();
  Loan loan;
  for (size_t i = 0; i < arguments; ++i) {
    c10::IValue& value = (*stack)[stack->size() - arguments + i];
    value = lend_argument(loan, value, schema.arguments()[i], schema);
  }
  op.callBoxed(stack);
  loan.settle();
  for (size_t i = stack->size() - returns; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) value = loan.take_back(value.toTensor());
    if (!value.isTensorList()) continue;
    c10::List<Tensor> taken;
    for (const Tensor& tensor : value.toTensorVector()) taken.push_back(loan.take_back(tensor));
    value = taken;
  }
}

// ------------------------------------------------------------- what cannot run through the CPU: creation, copies, set_

Tensor empty_memory_format(c10::IntArrayRef sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                           std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &memory(), kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_with_strides(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<c10::ScalarType> dtype,
                          std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return empty_strided(sizes, strides, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool /*non_blocking*/) {
  // A copy that also converts crosses the link in the target's type, as with CUDA.
  Traffic& traffic = source.is_cpu() ? host_to_device : target.is_cpu() ? device_to_host : device_to_device;
  traffic.add(target.numel() * target.element_size());
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Loan loan;
  lend_if_on_device(loan, target).copy_(lend_if_on_device(loan, source));
  return target;
}

c10::Scalar local_scalar_dense(const Tensor& tensor) {  // `.item()`: on a real device a copy the host waits for
  device_to_host.add(tensor.element_size());
  return Loan().lend(tensor).item();
}

Tensor& set_storage_with_shape(Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef sizes,
                               c10::IntArrayRef strides) {
  TORCH_CHECK(source.device() == self.device(), "set_ expects a storage on ", self.device(), " but got one on ",
              source.device());
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage source) {
  const int64_t numel = source.nbytes() / self.element_size();
  return set_storage_with_shape(self, std::move(source), 0, {numel}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage_with_shape(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_empty(Tensor& self) { return set_tensor(self, empty_strided({0}, {1}, self.scalar_type())); }

struct Hooks final : at::HPUHooksInterface {
  explicit Hooks(at::HPUHooksArgs) {}
  void init() const override {}
  bool hasHPU() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return kDevice; }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(HPU, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::HPU>);
namespace at { C10_REGISTER_CLASS(HPUHooksRegistry, HPUHooks, ::Hooks) }

TORCH_LIBRARY_IMPL(_, HPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, HPU, m) {
  m.impl("empty.memory_format", &empty_memory_format);
  m.impl("empty_strided", &empty_with_strides);
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("set_", &set_empty);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage_with_shape);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  // The fallback is not asked for an operator that torch can also compute generically. The CPU's own kernel may round
  // otherwise than that (layer_norm does), and torch's device check names neither operator nor shape.
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (name.getNamespace() == "aten" && op->hasKernelForDispatchKey(c10::DispatchKey::CPU) &&
        !op->hasKernelForDispatchKey(c10::DispatchKey::HPU))
      m.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
}

// Copies read lazily conjugated and negated tensors as they stand; resolving these first is itself such a copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

// Autocast with CUDA's lists of operators.
#define PRETEND_LOWER_PRECISION(...) KERNEL(c10::DeviceType::HPU, __VA_ARGS__, lower_precision_fp)
#define PRETEND_FP32(...) KERNEL(c10::DeviceType::HPU, __VA_ARGS__, fp32)
#define PRETEND_PROMOTE(...) KERNEL(c10::DeviceType::HPU, __VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(_, AutocastHPU, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
namespace at {  // where the lists of autocast_mode.h look for the operators
TORCH_LIBRARY_IMPL(aten, AutocastHPU, m) {
  AT_FORALL_LOWER_PRECISION_FP(PRETEND_LOWER_PRECISION)
  AT_FORALL_FP32(PRETEND_FP32)
  AT_FORALL_PROMOTE(PRETEND_PROMOTE)
}
}  // namespace at

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(kDevice.type(), &memory());
  m.def("memory_stats", [] { return memory().stats(); });
  m.def("reset_peak", [] { memory().reset_peak(); });
  m.def("set_limit", [](size_t limit) { memory().set_limit(limit); });
  m.def("copy_stats", [] {
    return std::map<std::string, int64_t>{
        {"h2d_bytes", host_to_device.bytes}, {"h2d_copies", host_to_device.copies},
        {"d2h_bytes", device_to_host.bytes}, {"d2h_copies", device_to_host.copies},
        {"d2d_bytes", device_to_device.bytes}, {"d2d_copies", device_to_device.copies}};
  });
  m.def("reset_copy_stats", [] { host_to_device.reset(); device_to_host.reset(); device_to_device.reset(); });
}
