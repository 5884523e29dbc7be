// Run an exported shield in C++ with ONNX Runtime, and print how long a decision takes.
//
//   g++ -O2 -std=c++17 shield.cpp -I ORT/include -L ORT/lib -lonnxruntime -Wl,-rpath,ORT/lib -o shield
//   ./shield shield.onnx 1000
//
// ORT is the folder of a release of ONNX Runtime for C++ (onnxruntime-linux-x64-*.tgz). Its Python
// package has the library, but no headers; Debian 13 has both in libonnxruntime-dev. The program
// takes a shield of a Box of observations and a Box of actions of float32, with or without an input
// "constraint", which is h of the present state. It draws its inputs at random, and prints the first
// decision and the times of all.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <random>
#include <stdexcept>
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
    for (std::size_t input = 0; input < session_.GetInputCount(); ++input) {
      const std::string name = session_.GetInputNameAllocated(input, allocator).get();
      const auto shape = session_.GetInputTypeInfo(input).GetTensorTypeAndShapeInfo().GetShape();
      if (name == "observation" && shape.size() == 2) {
        observation_width = shape[1];
      } else if (name == "action" && shape.size() == 2) {
        action_width = shape[1];
      } else if (name == "constraint") {
        needs_constraint = true;
      } else {
        throw std::invalid_argument("this program cannot give the input \"" + name +
                                    "\": it is written for rows of observations and of actions");
      }
    }
  }

  // `constraint` is h of this state (h <= 0 is safe). It is not read where the shield estimates h.
  Decision filter(std::vector<float>& observation, std::vector<float>& action, double constraint) {
    const std::array<std::int64_t, 2> seen{1, observation_width}, proposed{1, action_width};
    const std::array<std::int64_t, 1> one{1};
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<Ort::Value> inputs;
    inputs.push_back(Ort::Value::CreateTensor<float>(memory, observation.data(),
                                                     observation.size(), seen.data(), seen.size()));
    inputs.push_back(Ort::Value::CreateTensor<float>(memory, action.data(), action.size(),
                                                     proposed.data(), proposed.size()));
    if (needs_constraint) {
      inputs.push_back(
          Ort::Value::CreateTensor<double>(memory, &constraint, 1, one.data(), one.size()));
    }
    static const std::array<const char*, 3> names{"observation", "action", "constraint"};
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
  bool needs_constraint = false;  // whether h of the state must be given

 private:
  Ort::Env env_;
  Ort::Session session_{nullptr};
};

void print(const char* name, const std::vector<float>& row) {
  std::printf("%s", name);
  for (float entry : row) std::printf(" %.9g", entry);
  std::printf("\n");
}

}  // namespace

int main(int count, char** arguments) try {
  if (count < 2) {
    std::fprintf(stderr, "usage: %s shield.onnx [decisions]\n", arguments[0]);
    return 2;
  }
  const int decisions = count > 2 ? std::max(1, std::atoi(arguments[2])) : 1000;
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
    const double constraint = uniform(generator);
    const auto before = std::chrono::steady_clock::now();
    const Decision decision = shield.filter(observation, action, constraint);
    micros.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() -
                                                               before)
                         .count());
    replaced += !decision.accepted;
    if (step > 0) continue;
    print("observation", observation);
    print("proposed", action);
    if (shield.needs_constraint) std::printf("constraint %.17g\n", constraint);
    print("executed", decision.action);
    std::printf("value %.9g, accepted %d, certified %d, valid %d\n", decision.value,
                decision.accepted, decision.certified, decision.valid);
  }
  std::sort(micros.begin(), micros.end());
  std::printf("%d decisions, %d replaced; median %.1f us, 99%% %.1f us, longest %.1f us\n",
              decisions, replaced, micros[micros.size() / 2], micros[micros.size() * 99 / 100],
              micros.back());
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
