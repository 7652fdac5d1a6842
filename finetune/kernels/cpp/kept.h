// Memory that a thread keeps from call to call: fresh memory costs its page faults, as long as some kernels' work.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

// Begins a line of 64 bytes; what it held is lost when it grows.
class Kept {
   public:
    template <class T> T* at_least(std::int64_t count) {
        std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            memory_.reset();
            memory_.reset(std::aligned_alloc(64, bytes));
            if (!memory_) std::abort();
            size_ = bytes;
        }
        return static_cast<T*>(memory_.get());
    }
    void shrink(std::size_t bytes) {
        if (size_ > bytes) memory_.reset(), size_ = 0;
    }

   private:
    std::unique_ptr<void, decltype(&std::free)> memory_{nullptr, &std::free};
    std::size_t size_ = 0;
};
