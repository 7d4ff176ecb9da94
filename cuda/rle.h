// COCO's run-length codes. Pixels go down the columns: row y of column x has place x * height + y; runs of zeros and of
// ones follow each other, zeros first. Compressed, a length is written in groups of five bits, lowest first, the sixth
// bit saying that more follow; from the fourth length on, only the difference to the last but one is written.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace solq {

// The places where an image changes between 0 and 1; it starts with 0.
class Changes {
 public:
  void clear() {
    places_.clear();
    value_ = false;
  }
  void set(int64_t place, bool value) {
    if (value == value_) return;
    value_ = value;
    if (!places_.empty() && places_.back() == place) return places_.pop_back();  // the run before has no pixels
    places_.push_back(place);
  }

  std::string compress(int64_t pixels) const {
    std::string text;
    text.reserve(2 * places_.size() + 8);
    int64_t before = 0, runs[2] = {0, 0};  // of zeros and of ones
    const auto write = [&](size_t index, int64_t run) {
      const int64_t difference = index > 2 ? run - runs[index % 2] : run;
      runs[index % 2] = run;
      append(difference, text);
    };
    for (size_t i = 0; i < places_.size(); ++i) {
      write(i, places_[i] - before);
      before = places_[i];
    }
    if (before < pixels || places_.empty()) write(places_.size(), pixels - before);
    return text;
  }

 private:
  static void append(int64_t number, std::string& text) {
    for (bool more = true; more;) {
      const int64_t group = number & 0x1f;
      number >>= 5;
      more = number != ((group & 0x10) ? -1 : 0);
      text.push_back(char(48 + group + (more ? 0x20 : 0)));
    }
  }

  std::vector<int64_t> places_;
  bool value_ = false;
};

// The places of a compressed code where 0 and 1 change, starts and ends of runs of ones in turn; always an even number.
inline void expand(const char* text, const char* end, std::vector<int64_t>& places) {
  places.clear();
  int64_t place = 0, runs[2] = {0, 0};
  for (size_t index = 0; text < end; ++index) {
    int64_t number = 0;
    int shift = 0;
    for (bool more = true; more && text < end; shift += 5) {
      const int64_t group = *text++ - 48;
      number |= (group & 0x1f) << shift;
      more = group & 0x20;
      if (!more && (group & 0x10)) number |= -1LL << (shift + 5);
    }
    runs[index % 2] = index > 2 ? number + runs[index % 2] : number;
    place += runs[index % 2];
    places.push_back(place);
  }
  if (places.size() % 2 == 1) places.pop_back();  // the zeros at the end
}

}  // namespace solq
