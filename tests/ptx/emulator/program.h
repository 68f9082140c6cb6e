// A kernel as the parser makes it of PTX, and as the machine runs it.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "numbers.h"

namespace ptx {

// What ends a run: PTX that is not understood, or a fault behind which nothing can be emulated.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// As sprintf.
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// Where shared memory and parameters begin in the address space of a program. Global addresses are those of this process.
constexpr u32 SHARED_BASE = 1024;
constexpr u64 PARAMETER_WINDOW = 0x700000000000;
constexpr u64 SHARED_WINDOW = 0x710000000000;
constexpr u64 WINDOW_BYTES = 1ull << 32;

enum class Op : u8 {
    // Arithmetic: each lane by itself, from registers a, b and c to register d.
    Add, Sub, Mul, MulHigh, MulWide, Mad, MadWide, Div, Rem, Fma, Neg, Abs, InverseRoot, Min, Max, And, Or, Xor, Not,
    ShiftLeft, ShiftRight, Move, Select, Convert, Lop3, Permute, ExtractBits, Exp2, ToGeneric, FromGeneric, Compare, Pack, Unpack,
    Load, Store,
    Branch, BranchIndexed, Return, Nop,
    // What lanes of a warp do together.
    WarpSync, Elect, Shuffle, LoadMatrix, StoreMatrix,
    // What orders warps and copies.
    NamedBarrier, BarrierInit, BarrierArrive, BarrierWait, TensorLoad, ProxyFence, GridWait, SetRegisters,
    Wgmma, WgmmaCommit, WgmmaWait,
};

enum class Comparison : u8 {
    None, Equal, NotEqual, Less, LessOrEqual, Greater, GreaterOrEqual, OrderedPair, UnorderedPair
};

enum class Space : u8 { Generic, Global, Shared, Parameter };

// How a lane finds the lane that a shuffle reads.
enum class ShuffleMode : u8 { Index, Up, Down, Butterfly };

constexpr int NO_REGISTER = -1;

// [register + offset]
struct Address {
    int base = NO_REGISTER;
    s64 offset = 0;
};

struct Instruction {
    Op op = Op::Nop;
    Type type = Type::None;
    // Of Convert: the type that is converted. Of Wgmma: the type of A and B.
    Type source_type = Type::None;
    Space space = Space::Generic;
    // The instruction runs in lanes where this register is 1, or 0 if it is negated.
    int predicate = NO_REGISTER;
    bool predicate_negated = false;
    // All lanes of the warp must be here before it runs (.sync or .aligned).
    bool waits_for_lanes = false;
    bool flushes = false;  // .ftz
    // Registers of operands. Constants have registers too.
    int d = NO_REGISTER, a = NO_REGISTER, b = NO_REGISTER, c = NO_REGISTER;
    int second_d = NO_REGISTER;
    // Loads, stores, mbarriers; the destination of a copy.
    Address address;
    // Of a copy: the tensor map and the mbarrier.
    Address tensor_map, mbarrier;
    // Loaded or stored registers, registers of a matrix, coordinates of a copy.
    std::vector<int> registers;
    // Compare.
    Comparison comparison = Comparison::None;
    bool or_unordered = false;
    // The table of Lop3; the number of a wait_group or setmaxnreg; the dimensions of a copy.
    int number = 0;
    ShuffleMode shuffle = ShuffleMode::Index;
    bool increases = false;    // SetRegisters
    bool expects_bytes = false;  // BarrierArrive: b bytes are added to the transactions that the mbarrier waits for.
    bool transposed = false;   // LoadMatrix, StoreMatrix
    // Wgmma: the sizes n and k. A is four registers or a descriptor in register a.
    int n = 0, k = 0;
    std::vector<int> a_registers;
    bool transposed_a = false, transposed_b = false;
    // Branches: indices of instructions.
    std::vector<u32> targets;
    // For messages: the line in the PTX, the place in `Program::locations` (0: none), and the text.
    int line = 0, location = 0;
    std::string text;
};

// Special registers have the first numbers.
enum SpecialRegister {
    THREAD_X, THREAD_Y, THREAD_Z, THREADS_X, PROGRAM_X, PROGRAM_Y, PROGRAM_Z, PROGRAMS_X, PROGRAMS_Y, PROGRAMS_Z, LANE,
    NUM_SPECIAL
};

struct Parameter {
    std::string name;
    int size, offset;
};

struct SourceLine {
    int file, line;
};

struct Program {
    std::string name;
    std::vector<Instruction> code;
    std::vector<Parameter> parameters;
    int parameter_bytes = 0;
    int num_registers = NUM_SPECIAL;
    // Registers that hold constants, with their values.
    std::vector<std::pair<int, u64>> constants;
    // .reqntid and .maxnreg; 0 if the PTX does not say.
    int threads = 0, registers_at_start = 0;
    // Whether there is a griddepcontrol.wait.
    bool waits_for_grid = false;
    std::vector<std::string> files;
    std::vector<SourceLine> locations;
};

// Raises Fault if the PTX is not understood.
Program parse(const std::string& ptx);

}  // namespace ptx
