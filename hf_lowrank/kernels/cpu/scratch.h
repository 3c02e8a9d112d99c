// Memory of one thread that is kept between calls.
#pragma once

#include <cstdlib>

namespace hf_lowrank {

class Scratch {
   public:
    ~Scratch() { std::free(memory_); }

    char* at_least(size_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = (bytes + 63) / 64 * 64;
            memory_ = static_cast<char*>(std::aligned_alloc(64, size_));
            if (!memory_) size_ = 0;
        }
        return memory_;
    }

   private:
    char* memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace hf_lowrank
