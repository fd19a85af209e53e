// A pretend CUDA runtime: takes the place of libcudart.so.13 under torch, on a machine without a GPU.
//
// Written against the headers of the CUDA 13 toolkit and NVIDIA's public documentation of the runtime API. What torch
// does not call answers "not supported" (build.py makes a function of each such name).

#include "device.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

thread_local cudaError_t last_error = cudaSuccess;

bool is_sticky(int code) { return code == 700 || code == 719; }

cudaError_t ended(cudaError_t code) {
  if (gpu().sticky != cudaSuccess) code = gpu().sticky;
  if (code != cudaSuccess) last_error = code;
  return code;
}

cudaError_t begin_call(std::unique_lock<std::mutex>& lock, const char* name) {  // counts; the code that this call must fail with
  auto& all = gpu();
  ++all.calls[name];
  if (all.sticky != cudaSuccess) return all.sticky;
  auto it = all.faults.find(name);
  if (it == all.faults.end() || it->second.first-- > 0) return cudaSuccess;
  int code = it->second.second;
  all.faults.erase(it);
  if (is_sticky(code)) {
    all.sticky = static_cast<cudaError_t>(code);
    all.reached.wait(lock, [&] { return all.running == 0; });
  }
  return static_cast<cudaError_t>(code);
}

#define BEGIN(name)                     \
  std::unique_lock lock(gpu().mutex);   \
  if (auto failed = begin_call(lock, #name); failed != cudaSuccess) return ended(failed)

#define BEGIN_ON(name, handle)          \
  BEGIN(name);                          \
  auto* stream = stream_of(handle);     \
  if (stream == nullptr) return ended(cudaErrorInvalidResourceHandle)

cudaError_t make_stream(cudaStream_t* out, unsigned flags, int priority) {
  auto* stream = new CUstream_st;
  stream->priority = priority;
  stream->waits_for_legacy = !(flags & cudaStreamNonBlocking);
  gpu().streams.insert(stream);
  *out = stream;
  return ended(cudaSuccess);
}

cudaError_t launch(CUstream_st& stream, const void* function, void** arguments) {
  auto it = gpu().kernels.find(function);
  std::string name = it == gpu().kernels.end() ? "?" : it->second;
  advance(stream);
  if (name.find("spin_kernel") != std::string::npos) {  // torch.cuda._sleep(cycles)
    double ms = *static_cast<int64_t*>(arguments[0]) / CYCLES_PER_MS;
    enqueue(stream, Kind::order, [ms] { nap(ms); });
  } else if (++gpu().calls["kernel " + name] == 1) {
    fprintf(stderr, "pretend CUDA: a kernel that nothing computes: %s\n", name.c_str());
  }
  return ended(cudaSuccess);
}
}  // namespace

// ---- for runtime.py and operators.cpp -------------------------------------------------------------------------------

API int pretend_set(const char* name, const char* value) {
  std::lock_guard lock(gpu().mutex);
  if (std::string(name) == "SEED") gpu().random.seed(static_cast<unsigned>(atoi(value)));
  return gpu().settings.set(name, value);
}
// After `calls` more calls, `function` fails once with `code`; a negative `code` takes that back.
API void pretend_fail(const char* function, int64_t calls, int code) {
  std::lock_guard lock(gpu().mutex);
  if (code < 0) gpu().faults.erase(function);
  else gpu().faults[function] = {calls, code};
}
// What a new process would find: no error that stays, nothing page-locked but torch's own.
API void pretend_restart() {
  std::unique_lock lock(gpu().mutex);
  gpu().sticky = last_error = cudaSuccess;
  gpu().faults.clear();
  wait_for_all(lock);
  for (auto it = gpu().locked.begin(); it != gpu().locked.end();)
    it = it->second.is_allocated ? std::next(it) : gpu().locked.erase(it);
}
API size_t pretend_violations(char* text, size_t room) {  // and forgets them
  std::lock_guard lock(gpu().mutex);
  std::string joined;
  for (auto& one : gpu().violations) joined += one + "\n";
  snprintf(text, room, "%s", joined.c_str());
  gpu().violations.clear();
  return joined.size();
}
API size_t pretend_locked_bytes() {  // by cudaHostRegister
  std::lock_guard lock(gpu().mutex);
  size_t bytes = 0;
  for (auto& [at, one] : gpu().locked)
    if (!one.is_allocated) bytes += one.size;
  return bytes;
}
API size_t pretend_copied_bytes(int to_host) {
  std::lock_guard lock(gpu().mutex);
  return to_host ? gpu().copied_to_host : gpu().copied_to_device;
}
API size_t pretend_calls(char* text, size_t room) {  // "name count" of each function that was called
  std::lock_guard lock(gpu().mutex);
  std::string joined;
  for (auto& [name, count] : gpu().calls) joined += name + " " + std::to_string(count) + "\n";
  snprintf(text, room, "%s", joined.c_str());
  return joined.size();
}
struct PretendAccess {
  const void* pointer;
  size_t size;
  int is_write;
};
// Queues `work(data)` as a kernel that accesses this memory.
API int pretend_launch(cudaStream_t handle, const char* what, const PretendAccess* accesses, size_t count,
                       void (*work)(void*), void* data) {
  BEGIN_ON(cudaLaunchKernel, handle);
  // The host runs no further ahead; and it knows no more than before when it goes on.
  gpu().reached.wait(lock, [&] { return stream->queue.size() < LAUNCHES_AHEAD; });
  advance(*stream);
  const char* name = gpu().names.insert(what).first->c_str();
  for (bool is_write : {false, true})
    for (size_t i = 0; i < count; ++i) {
      auto& [pointer, size, writes] = accesses[i];
      if (bool(writes) != is_write) continue;
      auto place = place_of(pointer, size);
      if (place == Place::straddles) violate(std::string(what) + " reaches beyond an allocation");
      if (place == Place::pageable) violate(std::string(what) + " is given memory that is not the device's");
      touch(*stream, pointer, size, is_write, name);
    }
  enqueue(*stream, Kind::compute, [=] { work(data); });
  return ended(cudaSuccess);
}
API int pretend_float_products() { return gpu().settings.float_products; }
API void pretend_crash(const char* why) {  // a kernel has failed
  fprintf(stderr, "pretend CUDA: a kernel failed: %s\n", why);
  std::lock_guard lock(gpu().mutex);
  gpu().sticky = cudaErrorLaunchFailure;
}

// ---- device ---------------------------------------------------------------------------------------------------------

API cudaError_t cudaGetDeviceCount(int* count) {
  BEGIN(cudaGetDeviceCount);
  *count = 1;
  return ended(cudaSuccess);
}
// These two hide an error that stays: torch calls them in destructors, and one that fails there ends the process.
API cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
API cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : ended(cudaErrorInvalidDevice); }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "NVIDIA GeForce RTX 4090");
  memset(p->uuid.bytes, 0xFA, sizeof p->uuid.bytes);
  p->totalGlobalMem = static_cast<size_t>(gpu().settings.vram);
  p->major = 8, p->minor = 9, p->multiProcessorCount = 128, p->warpSize = 32;
  p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 99 << 10, p->sharedMemPerMultiprocessor = 100 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 1536, p->maxBlocksPerMultiProcessor = 24;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->l2CacheSize = 72 << 20, p->memoryBusWidth = 384, p->asyncEngineCount = 2;
  p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = p->hostRegisterSupported = 1;
  p->memoryPoolsSupported = p->streamPrioritiesSupported = p->canUseHostPointerForRegisteredMem = 1;
  p->pciBusID = 1;
  return ended(cudaSuccess);
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMultiProcessorCount: *value = 128; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 9; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrCanMapHostMemory: case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrHostRegisterSupported: case cudaDevAttrCanUseHostPointerForRegisteredMem: *value = 1; break;
    default: *value = 0;
  }
  return ended(cudaSuccess);
}
API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int) {
  snprintf(text, size, "0000:01:00.0");
  return ended(cudaSuccess);
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return ended(cudaSuccess);
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, ended(cudaSuccess); }
API cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
API cudaError_t cudaDeviceSynchronize() {
  BEGIN(cudaDeviceSynchronize);
  wait_for_all(lock);
  return ended(cudaSuccess);
}
API cudaError_t cudaPeekAtLastError() { return gpu().sticky != cudaSuccess ? gpu().sticky : last_error; }
API cudaError_t cudaGetLastError() {
  auto code = cudaPeekAtLastError();
  last_error = cudaSuccess;
  return code;
}
API const char* cudaGetErrorName(cudaError_t code) {
  static thread_local char text[32];
  snprintf(text, sizeof text, "cudaError%d", code);
  return text;
}
API const char* cudaGetErrorString(cudaError_t code) {
  switch (static_cast<int>(code)) {
    case 0: return "no error";
    case 1: return "invalid argument";
    case 2: return "out of memory";
    case 400: return "invalid resource handle";
    case 600: return "device not ready";
    case 700: return "an illegal memory access was encountered";
    case 712: return "part or all of the requested memory range is already mapped";
    case 713: return "pointer does not correspond to a registered memory region";
    case 719: return "unspecified launch failure";
    case 801: return "operation not supported";
    case 900: return "operation not permitted when stream is capturing";
    default: return "a pretend error";
  }
}

// ---- streams and events ---------------------------------------------------------------------------------------------

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority) {
  BEGIN(cudaStreamCreateWithPriority);
  return make_stream(out, flags, priority);
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t) { return ended(cudaSuccess); }  // its thread stays, without work
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return *priority = stream ? stream->priority : 0, ended(cudaSuccess);
}
API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  BEGIN_ON(cudaStreamQuery, handle);
  if (!stream->last->is_reached) return ended(cudaErrorNotReady);
  join(gpu().host, stream->last->clock);
  return ended(cudaSuccess);
}
API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  BEGIN_ON(cudaStreamSynchronize, handle);
  advance(*stream);
  host_wait(lock, end_of(*stream));
  return ended(cudaSuccess);
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  BEGIN_ON(cudaStreamWaitEvent, handle);
  if (!event) return ended(cudaErrorInvalidResourceHandle);
  if (!event->point) return ended(cudaSuccess);  // never recorded: no wait
  advance(*stream);
  enqueue(*stream, Kind::order, nullptr, {event->point});
  return ended(cudaSuccess);
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, ended(cudaSuccess);
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*,
                                         const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return ended(cudaSuccess);
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return ended(cudaSuccess); }
API cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  BEGIN_ON(cudaLaunchHostFunc, handle);
  advance(*stream);
  enqueue(*stream, Kind::order, [=] { function(data); });
  return ended(cudaSuccess);
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags) {
  BEGIN(cudaEventCreate);
  *out = new CUevent_st{!(flags & cudaEventDisableTiming), nullptr};
  return ended(cudaSuccess);
}
API cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  BEGIN(cudaEventDestroy);
  delete event;
  return ended(cudaSuccess);
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned) {
  BEGIN_ON(cudaEventRecord, handle);
  if (!event) return ended(cudaErrorInvalidResourceHandle);
  advance(*stream);
  event->point = end_of(*stream);
  return ended(cudaSuccess);
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
API cudaError_t cudaEventQuery(cudaEvent_t event) {
  BEGIN(cudaEventQuery);
  if (!event) return ended(cudaErrorInvalidResourceHandle);
  if (!event->point) return ended(cudaSuccess);
  if (!event->point->is_reached) return ended(cudaErrorNotReady);
  join(gpu().host, event->point->clock);
  return ended(cudaSuccess);
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  BEGIN(cudaEventSynchronize);
  if (!event) return ended(cudaErrorInvalidResourceHandle);
  if (auto point = event->point) host_wait(lock, point);
  return ended(cudaSuccess);
}
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  BEGIN(cudaEventElapsedTime);
  if (!begin || !end || !begin->has_time || !end->has_time || !begin->point || !end->point)
    return ended(cudaErrorInvalidResourceHandle);
  if (!begin->point->is_reached || !end->point->is_reached) return ended(cudaErrorNotReady);
  *ms = static_cast<float>(end->point->at_ms - begin->point->at_ms);
  return ended(cudaSuccess);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

API cudaError_t cudaMalloc(void** out, size_t size) {
  BEGIN(cudaMalloc);
  return ended(allocate(out, size, false));
}
API cudaError_t cudaFree(void* pointer) {
  BEGIN(cudaFree);
  if (!pointer) return ended(cudaSuccess);
  wait_for_all(lock);  // as the real one does
  auto it = gpu().allocations.find(address(pointer));
  if (it == gpu().allocations.end()) return ended(cudaErrorInvalidValue);
  deallocate(it);
  return ended(cudaSuccess);
}
API cudaError_t cudaMallocAsync(void** out, size_t size, cudaStream_t handle) {
  BEGIN_ON(cudaMallocAsync, handle);
  auto code = allocate(out, size, true);
  if (code != cudaErrorMemoryAllocation) return ended(code);
  wait_for_all(lock);  // some may be about to be freed
  return ended(allocate(out, size, true));
}
API cudaError_t cudaFreeAsync(void* pointer, cudaStream_t handle) {
  BEGIN_ON(cudaFreeAsync, handle);
  auto it = gpu().allocations.find(address(pointer));
  if (it == gpu().allocations.end()) return ended(cudaErrorInvalidValue);
  advance(*stream);
  touch(*stream, pointer, it->second.size, true, "cudaFreeAsync");
  enqueue(*stream, Kind::order, [pointer] {
    std::lock_guard lock(gpu().mutex);
    auto it = gpu().allocations.find(address(pointer));
    if (it != gpu().allocations.end()) deallocate(it);
  });
  return ended(cudaSuccess);
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  BEGIN(cudaMemGetInfo);
  *total = static_cast<size_t>(gpu().settings.vram);
  *free = static_cast<size_t>(std::max(0.0, gpu().settings.vram - gpu().used));
  return ended(cudaSuccess);
}
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  return *pool = reinterpret_cast<cudaMemPool_t>(&gpu()), ended(cudaSuccess);
}
static bool is_peak(cudaMemPoolAttr attribute) {
  return attribute == cudaMemPoolAttrReservedMemHigh || attribute == cudaMemPoolAttrUsedMemHigh;
}
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr attribute, void*) {
  BEGIN(cudaMemPoolSetAttribute);
  if (is_peak(attribute)) gpu().pooled_peak = gpu().pooled;
  return ended(cudaSuccess);
}
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr attribute, void* value) {
  BEGIN(cudaMemPoolGetAttribute);
  double bytes = is_peak(attribute) ? gpu().pooled_peak : gpu().pooled;
  if (attribute < cudaMemPoolAttrReleaseThreshold) *static_cast<int*>(value) = 1;
  else *static_cast<uint64_t*>(value) = static_cast<uint64_t>(bytes);
  return ended(cudaSuccess);
}
API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return ended(cudaSuccess); }
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return ended(cudaSuccess); }
API cudaError_t cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void* value) {
  return *static_cast<uint64_t*>(value) = 0, ended(cudaSuccess);
}
API cudaError_t cudaHostAlloc(void** out, size_t size, unsigned) {
  BEGIN(cudaHostAlloc);
  *out = map_pages(rounded(size, PAGE));
  if (!*out) return ended(cudaErrorMemoryAllocation);
  gpu().locked[address(*out)] = {size, true, {}};
  return ended(cudaSuccess);
}
API cudaError_t cudaFreeHost(void* pointer) {
  BEGIN(cudaFreeHost);
  return ended(pointer ? unlock_pages(address(pointer), true, "cudaFreeHost") : cudaSuccess);
}
API cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  BEGIN(cudaHostRegister);
  return ended(lock_pages(address(pointer), size));
}
API cudaError_t cudaHostUnregister(void* pointer) {
  BEGIN(cudaHostUnregister);
  return ended(pointer ? unlock_pages(address(pointer), false, "cudaHostUnregister") : cudaErrorInvalidValue);
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  BEGIN(cudaPointerGetAttributes);
  auto place = place_of(pointer, 1);
  *attributes = {};
  attributes->type = place == Place::device   ? cudaMemoryTypeDevice
                     : place == Place::locked ? cudaMemoryTypeHost
                                              : cudaMemoryTypeUnregistered;
  attributes->device = place == Place::pageable ? -2 : 0;
  if (place != Place::pageable) attributes->devicePointer = const_cast<void*>(pointer);
  if (place != Place::device) attributes->hostPointer = const_cast<void*>(pointer);
  return ended(cudaSuccess);
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t handle) {
  BEGIN_ON(cudaMemcpyAsync, handle);
  return ended(copy(lock, to, from, size, *stream, true));
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  BEGIN(cudaMemcpy);
  return ended(copy(lock, to, from, size, gpu().legacy, false));
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t handle) {
  BEGIN_ON(cudaMemsetAsync, handle);
  advance(*stream);
  touch(*stream, to, size, true, "memset");
  enqueue(*stream, Kind::compute, [=] { memset(to, value, size); });
  return ended(cudaSuccess);
}
API cudaError_t cudaMemset(void* to, int value, size_t size) { return cudaMemsetAsync(to, value, size, nullptr); }

// ---- kernels: those of torch compute nothing; operators.cpp computes in their place ---------------------------------

API void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*,
                                int*) {
  std::lock_guard lock(gpu().mutex);
  gpu().kernels[function] = name;
}
API unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = *block = dim3{1, 1, 1}, *shared = 0, *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void** arguments, size_t, cudaStream_t handle) {
  BEGIN_ON(cudaLaunchKernel, handle);
  return launch(*stream, function, arguments);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void** arguments, size_t, cudaStream_t handle) {
  BEGIN_ON(cudaLaunchKernel, handle);
  return launch(*stream, reinterpret_cast<const void*>(kernel), arguments);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  BEGIN_ON(cudaLaunchKernel, config->stream);
  return launch(*stream, function, arguments);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 32, attributes->binaryVersion = 89;
  return ended(cudaSuccess);
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return ended(cudaSuccess); }
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- the rest -------------------------------------------------------------------------------------------------------

static int no_driver() { return cudaErrorNotSupported; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* status) {
  *function = reinterpret_cast<void*>(no_driver);
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
API int pretend_unsupported(const char* name) {
  std::lock_guard lock(gpu().mutex);
  if (gpu().calls[name]++ == 0) fprintf(stderr, "pretend CUDA: not supported: %s\n", name);
  return ended(cudaErrorNotSupported);
}
