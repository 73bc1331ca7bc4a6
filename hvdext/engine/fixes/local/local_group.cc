#include "local_group.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>

#include "gloo/allgather.h"
#include "gloo/allreduce.h"

#include "../gloo/gloo_context.h"
#include "../logging.h"
#include "local_collectives.h"

namespace {

std::mutex state_mutex;
std::string state = "not started";

void Tell(const std::string& text) {
  std::lock_guard<std::mutex> guard(state_mutex);
  state = text;
}

} // namespace

// "on", with how many hosts if several, or why the ranks of this job do not share memory. The text lives until the
// next call by this thread.
extern "C" const char* horovod_local_transport() {
  static thread_local std::string text;
  std::lock_guard<std::mutex> guard(state_mutex);
  text = state;
  return text.c_str();
}

namespace horovod {
namespace common {

std::shared_ptr<LocalGroup> LocalGroup::Meet(const std::shared_ptr<gloo::Context>& context, int ranks_here,
                                             bool is_global, const ConnectLeaders& connect_leaders) {
  if (context->size == 1) {
    return nullptr;
  }
  auto gather = [&](const void* mine, void* all, size_t bytes) {
    gloo::AllgatherOptions options(context);
    options.setInput(static_cast<uint8_t*>(const_cast<void*>(mine)), bytes);
    options.setOutput(static_cast<uint8_t*>(all), bytes * context->size);
    gloo::allgather(options);
  };
  hvdext::LocalTransport::Setting setting{context->getTimeout(), ranks_here};
  std::vector<int> host_of;
  std::string why_not;
  std::unique_ptr<hvdext::LocalTransport> memory;
  try {
    memory = hvdext::LocalTransport::Connect(context->rank, context->size, setting, gather, host_of, why_not);
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("The ranks could not ask each other whether they share memory; do all of "
                                         "them have the same engine (hvdext doctor)? ") + error.what());
  }
  std::shared_ptr<LocalGroup> group;
  if (memory != nullptr) {
    group.reset(new LocalGroup(context->rank, host_of, std::move(memory)));
    group->everybody_ = std::make_unique<GlooContext>();
    group->everybody_->ctx = context;
    if (!group->IsOneHost() && group->memory_->rank() == 0) {
      group->leaders_ = std::make_unique<GlooContext>();
      group->leaders_->ctx = connect_leaders(group->host(), group->hosts_);
    }
    why_not = group->IsOneHost() ? "" : " within each of " + std::to_string(group->hosts_) + " hosts";
  }
  if (is_global) {
    Tell(group ? "on" + why_not : "off: " + why_not);
    if (group != nullptr) {
      group->memory_->ShareBells(group->IsOneHost());
    }
  }
  LOG(DEBUG) << "Shared memory of " << context->size << " ranks: " << (group ? "on" : "off: ") << why_not;
  return group;
}

LocalGroup::LocalGroup(int rank, std::vector<int> host_of, std::unique_ptr<hvdext::LocalTransport> memory)
    : rank_(rank), host_of_(std::move(host_of)), memory_(std::move(memory)) {
  hosts_ = 1 + *std::max_element(host_of_.begin(), host_of_.end());
  std::vector<int> members(hosts_, 0);
  for (int host : host_of_) {
    place_of_.push_back(members[host]++);
  }
}

void LocalGroup::CombineBits(long long* words, int count, bool both) {
  auto combine = [both](long long a, long long b) { return both ? a & b : a | b; };
  hvdext::CombineBits(*memory_, words, count, combine);
  if (leaders_ != nullptr) {
    hvdext::LocalTransport::Away away(*memory_);
    gloo::AllreduceOptions options(leaders_->ctx);
    options.setOutput(words, count);
    options.setReduceFunction([combine](void* out, const void* a, const void* b, size_t length) {
      std::transform(static_cast<const long long*>(a), static_cast<const long long*>(a) + length,
                     static_cast<const long long*>(b), static_cast<long long*>(out), combine);
    });
    gloo::allreduce(options);
  }
  if (!IsOneHost()) {
    hvdext::Broadcast(*memory_, words, count * sizeof(long long), 0);
  }
}

} // namespace common
} // namespace horovod
