// Runs one operation once on real threads, for ThreadSanitizer: races OPERATION ARGUMENTS [DEFECT].
//
// harness.py has written the file of arguments. The numbers do not matter here, only who touches
// them when.
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fstream>

#include "operations.cpp"

namespace {

// The arguments as the file keeps them, one after the other: how many tensors and two numbers; of
// each tensor the dtype, the dimensions, the sizes and the elements.
class File {
 public:
  explicit File(const char* path) : file_(path, std::ios::binary) {}

  std::vector<Argument> arguments() {
    std::vector<Argument> all(next<int64_t>());
    for (Argument& argument : all) {
      argument.count = next<int64_t>();
      argument.whole = next<int64_t>();
      argument.number = next<double>();
      std::vector<HostTensor>& list = lists_.emplace_back(argument.count);
      for (HostTensor& t : list) t = tensor();
      argument.tensors = list.data();
    }
    cwbr::check(file_.good(), "the file of arguments is short");
    return all;
  }

 private:
  template <class T>
  T next() {
    T value{};
    file_.read(reinterpret_cast<char*>(&value), sizeof(value));
    return value;
  }

  HostTensor tensor() {
    const auto dtype = static_cast<int32_t>(next<int64_t>());
    std::vector<int64_t>& sizes = sizes_.emplace_back(next<int64_t>());
    int64_t bytes = cwbr::element_size(static_cast<cwbr::ScalarType>(dtype));
    for (int64_t& size : sizes) bytes *= size = next<int64_t>();
    std::vector<char>& data = data_.emplace_back(bytes);
    file_.read(data.data(), bytes);
    return {data.data(), sizes.data(), static_cast<int32_t>(sizes.size()), dtype, 0};
  }

  std::ifstream file_;
  std::deque<std::vector<HostTensor>> lists_;
  std::deque<std::vector<int64_t>> sizes_;
  std::deque<std::vector<char>> data_;
};

}  // namespace

int main(int count, char** strings) {
  configure(1, count > 3 ? atoi(strings[3]) : -1, 2);
  File file(strings[2]);
  const std::vector<Argument> arguments = file.arguments();
  call(strings[1], arguments.data(), std::ssize(arguments));
  puts("done");
}
