// The machine that runs the programs (thread blocks) of a grid, one after another.
//
// The threads of a program are warps, and a warp's lanes run together while they are at the same instruction. Each file named
// below implements a part of the machine.
#pragma once

#include <deque>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "program.h"

namespace ptx {

constexpr int LANES = 32;
constexpr u32 ALL_LANES = 0xffffffff;
constexpr int WARPGROUP = 4;
constexpr int NUM_NAMED_BARRIERS = 16;

// When copies are done: when they are issued, when all warps wait (in any order with a seed), or at any time.
enum class CopyTime : s32 { Early, Late, Random };

// The layout is known to machine.py.
struct Options {
    // Whether products are computed when they are waited for, and not when they are issued.
    s32 late_products;
    CopyTime copies;
    // 0: warps run in turn until they wait. Odd: in random order. Even: by priorities, so that some wait for long.
    s32 seed;
};

// Global memory that the kernel may touch; the layout is known to machine.py.
struct Buffer {
    u64 begin, end;
    // Whether nothing may touch it before griddepcontrol.wait.
    s32 chained;
    const char* name;
};

// The 128 bytes of a tensor map as machine.py writes them: those of CUDA are not documented.
struct TensorMap {
    u64 magic, base;
    // Innermost dimension first. strides: of the others, in bytes.
    u64 dimensions[5], strides[4];
    u32 box[5];
    // swizzle: 0, or 1, 2, 3 for 32, 64 and 128 bytes.
    u16 rank, element_bytes, swizzle, unused;
};
constexpr u64 TENSOR_MAP_MAGIC = 0x54454e534d415031;

// A vector clock: how far the holder knows the work of each warp and each mbarrier.
using Clock = std::vector<u32>;
void join(Clock& into, const Clock& other);

struct Mbarrier {
    u32 count;
    s64 pending, bytes;
    u64 phase;
    // Its entry in clocks. Copies that arrive here count as its work.
    int agent;
    Clock arrivals, released;
    int initialised_by;
    u32 initialised_at;
};

struct NamedBarrier {
    int arrived = 0;
    // How many threads it waits for; ALL_THREADS: all that have not ended.
    int expected = 0;
    std::vector<int> waiting;
    Clock clock;
};
constexpr int ALL_THREADS = -1;

// A wgmma of one warp that is not waited for.
struct Product {
    const Instruction* instruction;
    u64 descriptor_a, descriptor_b;
    bool adds;
    bool committed = false, done = false;
    // Addresses of B and A in shared memory.
    u32 b_begin, b_end;
    u32 a_begin = ~0u, a_end = 0;
};

enum class WarpState { Runs, AtMbarrier, AtNamedBarrier, AtGrid, AtRegisters, Ended };

struct Warp {
    int number;
    WarpState state = WarpState::Runs;
    // Lanes that have not ended, and those of them that wait at an mbarrier.
    u32 live = ALL_LANES, blocked = 0;
    // All lanes are at `pc`; if they are not together, each at its own.
    bool together = true;
    u32 pc = 0;
    u32 lane_pc[LANES];
    // Registers: LANES values for each.
    std::vector<u64> registers;
    // `Machine::version_` when it began to wait at an mbarrier or for registers.
    u64 waits_since = 0;
    u32 waits_at = 0, waits_for_parity = 0;
    std::vector<Product> products;
    // How many products each wgmma group has that is not waited for.
    std::vector<int> groups;
    // `Machine::stores_` at its last fence.proxy.async.
    u64 fenced_at = 0;
    Clock clock;
    int num_registers = 0;
    // The setmaxnreg instructions that it has run.
    std::vector<std::pair<bool, int>> register_changes;

    u64* lanes_of(int place) { return registers.data() + static_cast<size_t>(place) * LANES; }
    u64 address(const Address& address, int lane) { return lanes_of(address.base)[lane] + address.offset; }
};

// A copy to shared memory that is under way.
struct Copy {
    TensorMap map;
    s64 coordinates[5];
    u32 destination, mbarrier, bytes;
    int warp;
    u32 pc;
};

// A descriptor of wgmma, decoded.
struct MatrixDescriptor {
    u32 start, leading_offset, stride_offset;
    int swizzle;
};

// Calls visit(lane) for each lane of a mask.
template <class Visit>
inline void for_each_lane(u32 mask, Visit visit) {
    for (; mask != 0; mask &= mask - 1) {
        visit(__builtin_ctz(mask));
    }
}

inline int first_lane(u32 mask) {
    return __builtin_ctz(mask);
}

class Machine {
public:
    Machine(const Program& program, const Options& options, std::vector<Buffer> buffers);
    // parameters: the values of all parameters, one after the other. Returns whether nothing was found.
    bool run(const u8* parameters, const u32 grid[3], int threads, u32 shared_bytes);
    const std::string& report() const { return report_; }

private:
    enum class Step { Next, Jumped, Waits, Ended };
    enum class ByteState : u8 { Unwritten, Written, CopyUnderWay, Barrier };

    // scheduler.cpp: programs, and which warp runs.
    void run_program();
    void begin_program();
    void begin_warp(Warp& warp, int number);
    bool step_others();
    int pick_warp(const std::vector<int>& ready, s64& steps);
    int pick_by_priority(const std::vector<int>& ready);
    void end_program();
    u64 random();

    // warp.cpp: the instructions of a warp, one by one.
    void run_warp(Warp& warp, s64 steps);
    u32 next_lanes(Warp& warp);
    Step execute(Warp& warp, const Instruction& i, u32 lanes);
    Step execute_rare(Warp& warp, const Instruction& i, u32 active);
    Step branch(Warp& warp, const Instruction& i, u32 lanes, u32 active);
    Step end_lanes(Warp& warp, u32 lanes, u32 active);
    void separate(Warp& warp);
    void elect(Warp& warp, const Instruction& i, u32 active);
    void shuffle(Warp& warp, const Instruction& i, u32 active);
    Step set_registers(Warp& warp, const Instruction& i);

    // arithmetic.cpp
    void arithmetic(Warp& warp, const Instruction& i, u32 active);

    // memory.cpp: loads and stores, bounds, and what shared memory holds.
    void load(Warp& warp, const Instruction& i, u32 active);
    void store(Warp& warp, const Instruction& i, u32 active);
    void move_matrices(Warp& warp, const Instruction& i);
    u8* resolve(Space& space, u64 address, u32 bytes, bool writes);
    u8* global(u64 address, u32 bytes, bool writes, u32 alignment);
    u8* shared(u64 address, u32 bytes, bool writes, u32 alignment);
    void check_chained(u64 begin, u64 end, const char* what);
    void check_read(u32 address, u32 bytes);
    void check_async_read(u32 address, u32 bytes);
    void wrote(u32 address, u32 bytes, bool same_bytes);
    void check_products(u32 address, u32 bytes, const char* what);

    // races.cpp
    void race_read(u32 address, u32 bytes, bool checks);
    void race_write(u32 address, u32 bytes, int agent, u32 time, bool same_bytes);

    // barriers.cpp
    Mbarrier& mbarrier_at(u64 address);
    void initialise_mbarrier(Warp& warp, const Instruction& i, u32 active);
    void arrive(Warp& warp, const Instruction& i, u32 active);
    Step wait_mbarrier(Warp& warp, const Instruction& i, u32 active);
    void add_bytes(Mbarrier& barrier, s64 bytes);
    void complete_phase(Mbarrier& barrier);
    Step wait_named_barrier(Warp& warp, const Instruction& i, u32 active);
    void release_named_barrier(u32 number);

    // copies.cpp
    void issue_copies(Warp& warp, const Instruction& i, u32 active);
    TensorMap read_tensor_map(u64 address);
    void check_destination(const Copy& copy);
    void issue_copy(Copy& copy);
    void finish_copy(size_t number);
    void do_copy(const Copy& copy);

    // wgmma.cpp
    void issue_product(Warp& warp, const Instruction& i);
    void commit_products(Warp& warp);
    void wait_products(Warp& warp, int still_running);
    void do_product(Warp& warp, Product& product);
    MatrixDescriptor decode_descriptor(u64 bits);
    template <class Visit>
    void visit_operand(const MatrixDescriptor& descriptor, bool transposed, u32 first, u32 rows, u32 k, Visit visit);
    void note_operand_read(Warp& warp, const Product& product, bool checks);
    void read_operand(u64 descriptor, bool transposed, const Instruction& i, u32 first, u32 rows, float* values);

    // report.cpp
    [[noreturn]] void fail(const std::string& what) const { throw Fault(what); }
    void finding(const std::string& kind, const std::string& what);
    std::string instruction_text(u32 pc) const;
    std::string here() const;
    void report_state();
    std::string warp_text(Warp& warp) const;

    const Program& program_;
    const Options options_;
    const std::vector<Buffer> buffers_;
    bool has_chained_ = false;
    std::vector<u8> parameters_;
    u32 grid_[3], position_[3];
    int num_threads_ = 0, num_warps_ = 0;

    std::vector<Warp> warps_;
    Warp* current_ = nullptr;
    u32 pc_ = 0;
    u64 instructions_ = 0;
    // Changes whenever a warp that waits at an mbarrier or for registers may go on.
    u64 version_ = 1;

    // Shared memory, and for each of its bytes: what it holds, when it was stored, and by which warp. Copies store at 0.
    u32 shared_bytes_ = 0;
    std::vector<u8> memory_;
    std::vector<ByteState> byte_states_;
    std::vector<u32> stored_at_;
    std::vector<u8> stored_by_;
    u64 stores_ = 1;

    // For each two bytes of shared memory: the last write, and the time of each warp's last read.
    struct LastWrite {
        u32 time, pc;
        int agent;
    };
    std::vector<LastWrite> last_writes_;
    std::vector<u32> last_reads_;
    int clock_size_ = 0;

    std::map<u32, Mbarrier> mbarriers_;
    NamedBarrier named_barriers_[NUM_NAMED_BARRIERS];
    std::deque<Copy> copies_;
    bool copying_ = false;
    int num_products_ = 0;
    // Registers that setmaxnreg can take, for each thread of one warp.
    int free_registers_ = 0;
    bool past_grid_wait_ = false, any_grid_wait_ = false;

    u64 random_state_;
    std::vector<int> priorities_;
    int turn_ = 0;

    std::string report_;
    bool found_ = false;
    std::set<std::pair<std::string, u32>> found_at_;
};

}  // namespace ptx
