// Run an exported shield in C++ with ONNX Runtime, and print how long a decision takes.
//
//   g++ -O2 -std=c++17 shield.cpp -I ORT/include -L ORT/lib -lonnxruntime -Wl,-rpath,ORT/lib -o shield
//   ./shield shield.onnx 1000
//
// ORT is the folder of a release of ONNX Runtime for C++ (onnxruntime-linux-x64-*.tgz). Its Python
// package has the library, but no headers. The program takes a shield of a Box of observations and
// a Box of actions of float32 ("observation" and "action" are its only inputs without a default).

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace {

// One decision of the shield.
struct Decision {
  std::vector<float> action;  // what to execute
  float value;                // Q_h of this action, in units of h; infinity where it is not known
  bool accepted;              // whether this is the proposed action
  bool certified;             // whether the record's promise covers an episode that starts here
  bool valid;                 // whether observation and proposal could be used
};

class Shield {
 public:
  explicit Shield(const char* path) : env_(ORT_LOGGING_LEVEL_ERROR, "safeshield") {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    options.SetInterOpNumThreads(1);
    session_ = Ort::Session(env_, path, options);
    Ort::AllocatorWithDefaultOptions allocator;
    auto metadata = session_.GetModelMetadata();
    auto text = metadata.LookupCustomMetadataMapAllocated("safeshield", allocator);
    contents = text ? text.get() : "{}";
    observation_width = width(0);
    action_width = width(1);
  }

  Decision filter(std::vector<float>& observation, std::vector<float>& action) {
    const std::array<std::int64_t, 2> seen{1, observation_width}, proposed{1, action_width};
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::array<Ort::Value, 2> inputs{
        Ort::Value::CreateTensor<float>(memory, observation.data(), observation.size(),
                                        seen.data(), seen.size()),
        Ort::Value::CreateTensor<float>(memory, action.data(), action.size(), proposed.data(),
                                        proposed.size())};
    static const std::array<const char*, 2> names{"observation", "action"};
    static const std::array<const char*, 5> outputs{"action_executed", "value", "accepted",
                                                    "certified", "valid"};
    auto told = session_.Run(Ort::RunOptions{nullptr}, names.data(), inputs.data(), inputs.size(),
                             outputs.data(), outputs.size());
    const float* executed = told[0].GetTensorData<float>();
    return {std::vector<float>(executed, executed + action_width), told[1].GetTensorData<float>()[0],
            told[2].GetTensorData<bool>()[0], told[3].GetTensorData<bool>()[0],
            told[4].GetTensorData<bool>()[0]};
  }

  std::string contents;  // JSON: the promise, the record, the digests
  std::int64_t observation_width = 0, action_width = 0;

 private:
  std::int64_t width(std::size_t input) {
    return session_.GetInputTypeInfo(input).GetTensorTypeAndShapeInfo().GetShape().back();
  }

  Ort::Env env_;
  Ort::Session session_{nullptr};
};

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: %s shield.onnx [decisions]\n", arguments[0]);
    return 2;
  }
  const int decisions = count > 2 ? std::atoi(arguments[2]) : 1000;
  Shield shield(arguments[1]);
  std::printf("%s\n", shield.contents.c_str());
  std::mt19937 generator(0);
  std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
  std::vector<float> observation(shield.observation_width), action(shield.action_width);
  std::vector<double> micros;
  int replaced = 0;
  for (int step = 0; step < decisions; ++step) {
    for (float& entry : observation) entry = uniform(generator);
    for (float& entry : action) entry = uniform(generator);
    const auto before = std::chrono::steady_clock::now();
    const Decision decision = shield.filter(observation, action);
    micros.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() -
                                                               before)
                         .count());
    replaced += !decision.accepted;
  }
  std::sort(micros.begin(), micros.end());
  std::printf("%d decisions, %d replaced; median %.1f us, 99%% %.1f us, longest %.1f us\n",
              decisions, replaced, micros[micros.size() / 2], micros[micros.size() * 99 / 100],
              micros.back());
  return 0;
}
