// Runs a kernel: blocks a few at a time, their warps in turns of random length and order.
//
// The lanes of a warp that are at the same instruction execute it together, those that are behind
// first; or, where lanes are scattered, each runs alone until it has to wait for others.
#include "exchange.h"

namespace machine {

constexpr int kBlocksUnderWay = 3;
constexpr int kLongestTurn = 200;

// Opcodes that the scheduler itself understands precede those that have a function.
enum Control { kBranch, kEnd, kTrap, kBlockBarrier, kNothing, kControls };
constexpr const char* kControlNames[] = {"bra", "ret", "trap", "bar", "nop"};
constexpr int kArithmeticSize = sizeof(kArithmetic) / sizeof(Opcode);
constexpr int kExchangeSize = sizeof(kExchange) / sizeof(Opcode);

Execute function_of(int opcode) {
  const int index = opcode - kControls;
  return index < kArithmeticSize ? kArithmetic[index].execute
                                 : kExchange[index - kArithmeticSize].execute;
}

struct Program {
  const Instruction* code;
  int64_t count;
  const uint8_t* frame;  // registers of a warp, with the constants in place
  int64_t frame_bytes;
  int32_t special[10];  // places of %tid.x, y, z, %ntid.x, %ctaid.x, y, z, %nctaid.x, y, z, or -1
};

struct Launch {
  uint32_t grid[3];
  int32_t threads;
  int64_t shared_bytes;
  const uint8_t* parameters;
  const uint64_t* spans;  // begin, end and granule of each
  int64_t n_spans;
  uint64_t seed;
  int32_t scattered;
  int32_t watch_races;
  double approximation_error;
  uint8_t* executed;  // set to 1 for each instruction that some lane executes
};

namespace {

const Program* program;
const Launch* launch;
// Where the machine is: the instruction, the block and the first thread of the warp.
uint32_t running_pc, running_place[4];

Lanes guarded(Warp& warp, const Instruction& in, Lanes lanes) {
  if (in.guard < 0) return lanes;
  const uint8_t* guard = warp.registers<uint8_t>(in.guard);
  Lanes held = 0;
  for (int lane = 0; lane < kLanes; ++lane) held |= Lanes(guard[lane] != 0) << lane;
  return lanes & (in.negated ? ~held : held);
}

void set_pc(Warp& warp, Lanes lanes, uint32_t pc) {
  for_each(lanes, [&](int lane) { warp.pc[lane] = pc; });
}
void set_state(Warp& warp, Lanes lanes, State state) {
  for_each(lanes, [&](int lane) { warp.state[lane] = state; });
}
Lanes in_state(const Warp& warp, State state) {
  Lanes found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= Lanes(warp.state[lane] == state) << lane;
  return found & warp.present;
}
Lanes at(const Warp& warp, Lanes lanes, uint32_t pc) {
  Lanes found = 0;
  for_each(lanes, [&](int lane) { found |= Lanes(warp.pc[lane] == pc) << lane; });
  return found;
}

// Lets all threads of the block go on where the last of them has come to the barrier.
void meet_block(Warp& warp, Lanes lanes, uint32_t pc) {
  Block& block = *warp.block;
  set_pc(warp, lanes, pc + 1);
  set_state(warp, lanes, State::at_block_barrier);
  block.arrived += __builtin_popcount(lanes);
  if (block.arrived < launch->threads) return;
  block.arrived = 0;
  ++block.epoch;
  for (Warp& other : block.warps) set_state(other, other.present, State::running);
}

// Executes a warp-wide instruction once all lanes that it names are there; whether they are.
bool meet_warp(Warp& warp, const Instruction& in, Lanes lanes, uint32_t pc) {
  const int first = __builtin_ctz(lanes);
  const Lanes members = warp.registers<uint32_t>(in.lanes)[first] & warp.present;
  const Lanes together = lanes | at(warp, in_state(warp, State::at_warp_barrier), pc);
  if ((together & members) != members) {
    set_pc(warp, lanes, pc);
    set_state(warp, lanes, State::at_warp_barrier);
    return false;
  }
  if (together != members) throw Fault("a warp-wide instruction by lanes that it does not name");
  function_of(in.opcode)(warp, in, together);
  set_state(warp, together, State::running);
  set_pc(warp, together, pc + 1);
  return true;
}

// Runs the lanes that are furthest behind, or one alone, for some instructions.
void take_turn(Warp& warp, int turns) {
  const Lanes ready = in_state(warp, State::running);
  Lanes lanes = 0;
  uint32_t pc = 0, next = UINT32_MAX;
  if (launch->scattered) {
    int skip = random_bits() % __builtin_popcount(ready);
    lanes = ready;
    while (skip--) lanes &= lanes - 1;
    lanes &= -lanes;
    pc = warp.pc[__builtin_ctz(lanes)];
  } else {
    pc = UINT32_MAX;
    for_each(ready, [&](int lane) { pc = std::min(pc, warp.pc[lane]); });
    lanes = at(warp, ready, pc);
    for_each(ready & ~lanes, [&](int lane) { next = std::min(next, warp.pc[lane]); });
  }
  for (; turns > 0 && pc < next; --turns) {
    running_pc = pc;
    const Instruction& in = program->code[pc];
    const Lanes active = guarded(warp, in, lanes);
    launch->executed[pc] |= active != 0;
    if (in.opcode == kBranch) {
      const uint32_t target = static_cast<uint32_t>(in.immediate);
      set_pc(warp, lanes & ~active, pc + 1);
      set_pc(warp, active, target);
      if (active && active != lanes) return;
      pc = active ? target : pc + 1;
      continue;
    }
    if (in.opcode == kTrap && active) throw Fault("an assertion of the kernel fails");
    if (active && (in.opcode == kEnd || in.opcode == kBlockBarrier || in.lanes >= 0)) {
      set_pc(warp, lanes & ~active, pc + 1);
      if (in.opcode == kEnd) {
        set_state(warp, active, State::ended);
        warp.block->left -= __builtin_popcount(active);
        return;
      }
      if (in.opcode == kBlockBarrier) return meet_block(warp, active, pc);
      if (!meet_warp(warp, in, active, pc) || active != lanes || launch->scattered) return;
    } else if (in.opcode >= kControls && active) {
      function_of(in.opcode)(warp, in, active);
    }
    ++pc;
  }
  set_pc(warp, lanes, pc);
}

void set_special(Warp& warp, int which, int lane, uint32_t value) {
  const int place = program->special[which];
  if (place >= 0) warp.registers<uint32_t>(place)[lane] = value;
}

void begin(Block& block, uint32_t number, uint32_t serial) {
  block.serial = serial;
  block.index[0] = number % launch->grid[0];
  block.index[1] = number / launch->grid[0] % launch->grid[1];
  block.index[2] = number / launch->grid[0] / launch->grid[1];
  block.shared.assign(launch->shared_bytes, 0xff);
  block.shared_places.assign(launch->shared_bytes, Place());
  block.left = launch->threads;
  block.warps.resize((launch->threads + kLanes - 1) / kLanes);
  for (size_t w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    warp.block = &block;
    warp.first_thread = static_cast<int>(w) * kLanes;
    const int lanes = std::min(kLanes, launch->threads - warp.first_thread);
    warp.present = lanes == kLanes ? ~Lanes{0} : (Lanes{1} << lanes) - 1;
    warp.frame.assign(program->frame, program->frame + program->frame_bytes);
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t index[10] = {static_cast<uint32_t>(warp.first_thread + lane),
                                  0,
                                  0,
                                  static_cast<uint32_t>(launch->threads),
                                  block.index[0],
                                  block.index[1],
                                  block.index[2],
                                  launch->grid[0],
                                  launch->grid[1],
                                  launch->grid[2]};
      for (int i = 0; i < 10; ++i) set_special(warp, i, lane, index[i]);
    }
  }
}

// The warps with a lane that can go on.
std::vector<Warp*> ready_warps(std::vector<std::unique_ptr<Block>>& under_way) {
  std::vector<Warp*> found;
  for (auto& block : under_way)
    for (Warp& warp : block->warps)
      if (in_state(warp, State::running)) found.push_back(&warp);
  return found;
}

void run_all() {
  const uint64_t count = uint64_t(launch->grid[0]) * launch->grid[1] * launch->grid[2];
  std::vector<uint32_t> to_come(count);
  for (uint64_t i = 0; i < count; ++i) {
    to_come[i] = static_cast<uint32_t>(i);
    std::swap(to_come[i], to_come[random_bits() % (i + 1)]);
  }
  std::vector<std::unique_ptr<Block>> under_way, ended;
  blocks.assign(1, nullptr);
  while (!to_come.empty() || !under_way.empty()) {
    while (!to_come.empty() && under_way.size() < kBlocksUnderWay) {
      under_way.push_back(std::make_unique<Block>());
      begin(*under_way.back(), to_come.back(), static_cast<uint32_t>(blocks.size()));
      blocks.push_back(under_way.back().get());
      to_come.pop_back();
    }
    const std::vector<Warp*> ready = ready_warps(under_way);
    if (ready.empty()) throw Fault("threads wait for ever for others at a barrier");
    Warp& warp = *ready[random_bits() % ready.size()];
    memcpy(running_place, warp.block->index, sizeof(warp.block->index));
    running_place[3] = warp.first_thread;
    take_turn(warp, 1 + random_bits() % kLongestTurn);
    for (auto& block : under_way)
      if (block->left == 0) {
        block->warps.clear();
        block->shared_places = {};
        ended.push_back(std::move(block));
        std::swap(block, under_way.back());
        under_way.pop_back();
        break;
      }
  }
}

std::string message;

}  // namespace
}  // namespace machine

using machine::Launch;
using machine::Program;

// The number of an instruction, or -1.
extern "C" int find_opcode(const char* name) {
  for (int i = 0; i < machine::kControls; ++i)
    if (strcmp(name, machine::kControlNames[i]) == 0) return i;
  for (int i = 0; i < machine::kArithmeticSize; ++i)
    if (strcmp(name, machine::kArithmetic[i].name) == 0) return machine::kControls + i;
  for (int i = 0; i < machine::kExchangeSize; ++i)
    if (strcmp(name, machine::kExchange[i].name) == 0)
      return machine::kControls + machine::kArithmeticSize + i;
  return -1;
}

// Null, or what went wrong; then `pc` and `place` say at which instruction, in which block and
// thread (the first of its warp).
extern "C" const char* run(const Program* program, const Launch* launch, uint32_t* pc,
                           uint32_t* place) {
  machine::program = program;
  machine::launch = launch;
  machine::parameters = launch->parameters;
  machine::seed = launch->seed;
  machine::watch_races = launch->watch_races;
  machine::approximation_error = launch->approximation_error;
  machine::now = 0;
  machine::agreeing.clear();
  machine::spans.clear();
  std::vector<std::vector<machine::Place>> places;
  for (int64_t i = 0; i < launch->n_spans; ++i) {
    const uint64_t* span = launch->spans + 3 * i;
    places.emplace_back(machine::watch_races ? (span[1] - span[0]) / span[2] + 1 : 0);
    machine::spans.push_back(
        {span[0], span[1], static_cast<int64_t>(span[2]), places.back().data()});
  }
  try {
    machine::run_all();
  } catch (const machine::Fault& fault) {
    machine::message = fault.what();
    *pc = machine::running_pc;
    memcpy(place, machine::running_place, sizeof(machine::running_place));
    return machine::message.c_str();
  }
  return nullptr;
}
