// Instructions by which lanes, warps, copies and tensor cores work together.
#include <cstdio>
#include <cstdlib>

#include "parser.h"
#include "text.h"

namespace ptx {

// bar.sync and barrier.sync: number of the barrier, then the threads that it waits for. Without them: all.
void Parser::decode_named_barrier() {
    if (has("warp")) {
        instruction_.op = Op::WarpSync;
        instruction_.a = operand(text_of(0), Type::U32);
        return;
    }
    if (!has("sync")) {
        refuse("not emulated: " + instruction_.text);
    }
    instruction_.op = Op::NamedBarrier;
    instruction_.a = operand(text_of(0), Type::U32);
    if (operands_.size() > 1) {
        instruction_.b = operand(text_of(1), Type::U32);
    }
}

void Parser::decode_mbarrier() {
    if (has("init")) {
        instruction_.op = Op::BarrierInit;
        instruction_.address = address(text_of(0));
        instruction_.b = operand(text_of(1), Type::U32);
    } else if (has("arrive") && text_of(0) == "_" && !has("noComplete")) {
        // b: the bytes of expect_tx, or how many arrive; without it one does.
        instruction_.op = Op::BarrierArrive;
        instruction_.address = address(text_of(1));
        instruction_.expects_bytes = has("expect_tx");
        if (operands_.size() > 2) {
            instruction_.b = operand(text_of(2), Type::U32);
        }
    } else if (has("try_wait") && has("parity")) {
        instruction_.op = Op::BarrierWait;
        instruction_.d = operand(text_of(0));
        instruction_.address = address(text_of(1));
        instruction_.b = operand(text_of(2), Type::U32);
    } else {
        refuse("not emulated: " + instruction_.text);
    }
}

// cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [destination], [map, {x, y}], [mbarrier]
void Parser::decode_copy() {
    bool is_tiled_load = has("bulk") && has("tensor") && has("mbarrier::complete_tx::bytes") && !has_prefix("im2col");
    if (!is_tiled_load) {
        refuse("not emulated: " + instruction_.text);
    }
    instruction_.op = Op::TensorLoad;
    for (const std::string& modifier : modifiers_) {
        if (modifier.size() == 2 && modifier[1] == 'd') {
            instruction_.number = modifier[0] - '0';
        }
    }
    instruction_.address = address(text_of(0));
    std::string source = text_of(1).substr(1, text_of(1).size() - 2);
    std::vector<std::string> parts = split(source, ',');
    instruction_.tensor_map = address("[" + parts[0] + "]");
    instruction_.registers = register_list(parts.at(1), Type::U32);
    instruction_.mbarrier = address(text_of(2));
    if (static_cast<int>(instruction_.registers.size()) != instruction_.number) {
        refuse("coordinates are missing: " + instruction_.text);
    }
}

void Parser::decode_shuffle() {
    instruction_.op = Op::Shuffle;
    instruction_.shuffle = has("up")     ? ShuffleMode::Up
                           : has("down") ? ShuffleMode::Down
                           : has("bfly") ? ShuffleMode::Butterfly
                                         : ShuffleMode::Index;
    std::vector<std::string> results = split(text_of(0), '|');
    instruction_.d = operand(results[0]);
    if (results.size() > 1) {
        instruction_.second_d = operand(results[1]);
    }
    instruction_.a = operand(text_of(1));
    instruction_.b = operand(text_of(2), Type::U32);
    instruction_.c = operand(text_of(3), Type::U32);
}

void Parser::decode_elect() {
    instruction_.op = Op::Elect;
    std::vector<std::string> results = split(text_of(0), '|');
    instruction_.d = operand(results.at(0));
    instruction_.second_d = operand(results.at(1));
}

void Parser::decode_set_registers() {
    instruction_.op = Op::SetRegisters;
    instruction_.increases = has("inc");
    instruction_.number = atoi(text_of(0).c_str());
    if (instruction_.number < 24 || instruction_.number > 256 || instruction_.number % 8 != 0) {
        refuse("setmaxnreg takes a multiple of 8 from 24 to 256");
    }
}

void Parser::decode_wgmma() {
    if (has("fence")) {
        instruction_.op = Op::Nop;
    } else if (has("commit_group")) {
        instruction_.op = Op::WgmmaCommit;
    } else if (has("wait_group")) {
        instruction_.op = Op::WgmmaWait;
        instruction_.number = atoi(text_of(0).c_str());
    } else {
        decode_wgmma_product();
    }
}

// wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {d...}, a, b, whether d is added, 1, 1, a transposed, b transposed;
// A in registers has no "a transposed".
void Parser::decode_wgmma_product() {
    instruction_.op = Op::Wgmma;
    int m = 0;
    std::vector<Type> types;
    for (const std::string& modifier : modifiers_) {
        sscanf(modifier.c_str(), "m%dn%dk%d", &m, &instruction_.n, &instruction_.k);
        if (type_named(modifier) != Type::None) {
            types.push_back(type_named(modifier));
        }
    }
    bool known = m == 64 && types.size() == 3 && types[0] == Type::F32 && types[1] == types[2];
    // A row of A or B is 32 bytes.
    if (!known || has("sp") || size_of(types[1]) * instruction_.k != 32) {
        refuse("not emulated: " + instruction_.text);
    }
    instruction_.source_type = types[1];
    instruction_.registers = register_list(text_of(0));
    size_t a_count = 0;
    if (text_of(1)[0] == '{') {
        instruction_.a_registers = register_list(text_of(1));
        a_count = instruction_.a_registers.size();
    } else {
        instruction_.a = operand(text_of(1), Type::B64);
    }
    if (static_cast<int>(instruction_.registers.size()) != instruction_.n / 2 || (a_count != 0 && a_count != 4)) {
        refuse("registers of wgmma: " + instruction_.text);
    }
    instruction_.b = operand(text_of(2), Type::B64);
    instruction_.c = operand(text_of(3), Type::Predicate);
    if (text_of(4) != "1" || text_of(5) != "1") {
        refuse("a negated operand of wgmma is not emulated");
    }
    size_t next = 6;
    if (a_count == 0 && operands_.size() > next) {
        instruction_.transposed_a = text_of(next++) == "1";
    }
    if (operands_.size() > next) {
        instruction_.transposed_b = text_of(next) == "1";
    }
}

void Parser::decode_matrix(bool is_store) {
    instruction_.op = is_store ? Op::StoreMatrix : Op::LoadMatrix;
    instruction_.transposed = has("trans");
    instruction_.registers = register_list(text_of(is_store ? 1 : 0));
    instruction_.address = address(text_of(is_store ? 0 : 1));
    if (!has("m8n8") || !has("b16")) {
        refuse("not emulated: " + instruction_.text);
    }
}

}  // namespace ptx
