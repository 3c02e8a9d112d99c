#pragma once

#include <cstdint>

namespace hf_lowrank {

// Calls task(context, index) for every index in [0, count), from up to `threads` threads, the caller among them.
//
// The threads are those of the OpenMP runtime that torch has loaded: its workers spin for a while after each of
// torch's own parallel regions, and a second set of threads would have to share the cores with them. Where no such
// runtime is loaded, and in a forked child (in which OpenMP's threads do not exist), a small pool of sleeping threads
// takes their place.
void parallel_for(int threads, int64_t count, void (*task)(void* context, int64_t index), void* context);

// Does the same for a function object.
template <class Function>
void parallel_for(int threads, int64_t count, Function& function) {
    parallel_for(threads, count, [](void* context, int64_t index) { (*static_cast<Function*>(context))(index); }, &function);
}

}  // namespace hf_lowrank
