// A complete controller in C++: `make`, then `build/controller localhost:50051`.
//
// A server with tokens wants one in $TOKEN, and one with another --valid-for-ms that in $VALID_FOR_MS. Replace `camera`
// and `move`. docs/protocol.md explains every field; controller.py is the same program in Python.
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "equiserve/v1/policy.grpc.pb.h"
#include "google_rpc.pb.h"

namespace pb = equiserve::v1;
using Clock = std::chrono::steady_clock;  // ages and validity are differences of one clock, never times of day
using std::chrono::microseconds;
using std::chrono::milliseconds;

// The contract that this program was built for: 128 x 128 pixels, row 0 towards +x, metres. Another one is refused.
constexpr char kContract[] = R"({
  "observation": {"view": "topdown", "elevation_deg": 90.0, "height": 128, "width": 128, "extent_m": 0.45,
    "depth_min_m": 0.0, "depth_max_m": 0.6, "row_axis": [-1, 0], "col_axis": [0, -1], "plane_above_tool_m": 0.1,
    "gripper": "holding"},
  "action": {"fields": [
    {"name": "gripper", "components": ["p"], "kind": "scalar", "low": 0.0, "high": 1.0, "unit": "1"},
    {"name": "planar", "components": ["dx", "dy"], "kind": "vector", "limit": 0.05, "unit": "m"},
    {"name": "lift", "components": ["dz"], "kind": "scalar", "limit": 0.05, "unit": "m"},
    {"name": "yaw", "components": ["dtheta"], "kind": "pseudoscalar", "limit": 0.7853981633974483, "unit": "rad"}]}
})";
constexpr char kContractDigest[] = "bc7489a30b4bfe5fcda0b5b187e8d2d292b443ff7ccd872e2ee773d23cd74543";
constexpr int kSize = 128;
constexpr int kSteps = 5;
constexpr int kPatience = 3;  // so many steps in a row without a motion, and the episode is over

// The server's --valid-for-ms: of an older frame it says nothing, and what it has said comes too late.
milliseconds fresh() {
  const char* told = std::getenv("VALID_FOR_MS");
  return milliseconds(told ? std::atoi(told) : 200);
}

// Metres below the camera plane, row by row: a table, and a block that comes nearer from step to step.
std::vector<float> camera(int step) {
  std::vector<float> depth(kSize * kSize, 0.30f);
  for (int row = 20 + 4 * step; row < 34 + 4 * step; ++row) {
    std::fill_n(depth.begin() + row * kSize + 50, 14, 0.24f);
  }
  return depth;
}

// Relative to where the gripper is.
void move(const pb::Action& action) {
  std::printf("  p %.2f, (%+.4f, %+.4f, %+.4f) m, %+.3f rad\n", action.p(), action.dx(), action.dy(), action.dz(),
              action.dtheta());
}

// The status, and where the server itself refused, the parts of its google.rpc.ErrorInfo.
void explain(const grpc::Status& status) {
  std::printf("refused: %d: %s\n", status.error_code(), status.error_message().c_str());
  google::rpc::Status refusal;
  google::rpc::ErrorInfo info;
  refusal.ParseFromString(status.error_details());
  for (const auto& detail : refusal.details()) {
    if (detail.UnpackTo(&info)) {
      for (const char* part : {"field", "expected", "got", "remedy"}) {
        std::printf("  %s: %s\n", part, info.metadata().at(part).c_str());
      }
    }
  }
}

class Controller {
 public:
  Controller(const std::shared_ptr<grpc::Channel>& channel, std::string token)
      : policies_(pb::PolicyService::NewStub(channel)), token_(std::move(token)) {}

  // One episode. Whether it could be started and ended, and was not given up before any answer.
  bool run() {
    pb::StartEpisodeRequest start;
    start.set_contract(kContract);
    (*start.mutable_limits())["planar"] = 0.02f;
    pb::StartEpisodeResponse episode;
    auto context = call(milliseconds(5000));
    context->set_wait_for_ready(true);
    if (auto status = policies_->StartEpisode(context.get(), start, &episode); !status.ok()) {
      explain(status);
      return false;
    }
    episode_id_ = episode.episode_id();
    std::printf("episode of %s %s\n", episode.policy().c_str(), episode.version().c_str());

    pb::EndEpisodeRequest end;
    end.set_episode_id(episode_id_);
    end.set_outcome(pb::EndEpisodeRequest::OUTCOME_SUCCESS);
    for (int number = 1, still = 0; number <= kSteps; ++number) {
      still = step(number) ? 0 : still + 1;
      if (still == kPatience) {
        end.set_outcome(pb::EndEpisodeRequest::OUTCOME_ABORTED);
        break;
      }
    }
    end.set_applied_step(applied_);
    mistake();
    pb::EndEpisodeResponse ended;
    if (auto status = policies_->EndEpisode(call(milliseconds(5000)).get(), end, &ended); !status.ok()) {
      explain(status);
      return false;
    }
    std::printf("%s after %llu answered steps\n", pb::EndEpisodeRequest::Outcome_Name(end.outcome()).c_str(),
                static_cast<unsigned long long>(ended.steps()));
    return end.outcome() != pb::EndEpisodeRequest::OUTCOME_ABORTED || ended.steps() > 0;
  }

 private:
  // Look, ask, move. Whether the robot moved; if not, it stays where it is.
  bool step(int number) {
    const auto taken = Clock::now();
    auto request = look(number);
    at_rest_ = true;  // unless an answer comes in time
    const auto sent = Clock::now();  // the first time: what the answer's validity counts from
    const auto response = ask(request, taken);
    if (!response) return false;
    for (const auto& warning : response->warnings()) std::printf("  warning: %s\n", warning.c_str());
    for (const auto& change : response->interventions()) {
      std::printf("  %s: %s %g\n", change.field().c_str(), change.rule().c_str(), change.limit());
    }
    if (Clock::now() - sent >= microseconds(response->valid_for_us())) {
      std::printf("step %d: too late\n", number);
      return false;
    }
    std::printf("step %d: %s\n", number, response->hold() ? "hold" : "move");
    move(response->action());  // of a hold: no motion, and a gripper that keeps what it has
    applied_ = number;
    at_rest_ = response->hold();
    return !response->hold();
  }

  pb::GetActionRequest look(int number) {
    pb::GetActionRequest request;
    request.set_episode_id(episode_id_);
    request.set_step(number);
    request.set_applied_step(applied_);
    request.set_at_rest(at_rest_);
    request.set_contract_digest(kContractDigest);
    const auto depth = camera(number);
    auto& observation = *request.mutable_observation();
    observation.set_depth(depth.data(), depth.size() * sizeof(float));  // little-endian, as nearly every machine is
    observation.set_encoding(pb::Observation::FLOAT32_METERS);
    observation.set_height(kSize);
    observation.set_width(kSize);
    observation.set_gripper(0.0f);
    return request;
  }

  // The same step again only on UNAVAILABLE, and while the frame is fresh: nothing was wrong with the request.
  std::optional<pb::GetActionResponse> ask(pb::GetActionRequest& request, Clock::time_point taken) {
    for (bool again = false;; again = true) {
      const auto age = std::chrono::duration_cast<microseconds>(Clock::now() - taken);
      if (age >= fresh()) return std::nullopt;
      request.mutable_observation()->set_age_us(age.count());
      pb::GetActionResponse response;
      const auto context = call(std::chrono::ceil<milliseconds>(fresh() - age));
      if (again) context->AddMetadata("x-retry", "1");  // it may have been answered already
      const auto status = policies_->GetAction(context.get(), request, &response);
      if (status.ok()) return response;
      explain(status);
      if (status.error_code() != grpc::StatusCode::UNAVAILABLE) return std::nullopt;
      std::this_thread::sleep_for(milliseconds(20));
    }
  }

  // A deliberate one, to see what a refusal says.
  void mistake() {
    auto request = look(kSteps + 1);
    request.mutable_observation()->set_depth(std::string(100, '\0'));
    ask(request, Clock::now());
  }

  // What every call carries; a context serves one call.
  std::unique_ptr<grpc::ClientContext> call(milliseconds deadline) const {
    auto context = std::make_unique<grpc::ClientContext>();
    context->set_deadline(std::chrono::system_clock::now() + deadline);
    if (!token_.empty()) context->AddMetadata("authorization", "Bearer " + token_);
    return context;
  }

  std::unique_ptr<pb::PolicyService::Stub> policies_;
  std::string token_;
  std::string episode_id_;
  int applied_ = 0;      // the newest step that was carried out; 0: none
  bool at_rest_ = true;  // whether the arm stands still
};

int main(int argc, char** argv) {
  const char* token = std::getenv("TOKEN");
  const auto channel =
      grpc::CreateChannel(argc > 1 ? argv[1] : "localhost:50051", grpc::InsecureChannelCredentials());
  return Controller(channel, token ? token : "").run() ? 0 : 1;
}
