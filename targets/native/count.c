/* Counts the instructions of marked regions: a plugin for QEMU's user-mode emulation of arm64.
 *
 * A runner marks where a region begins and where it ends by getpgid(0x45444700 | mark), see plan.h: an even mark begins, the odd
 * one after it ends. For every region one line of JSON is written to the file named by the argument `out`, for example
 *
 *     {"region": 0, "instructions": 1234, "load_store": 400, ...}
 *
 * A class is a part of all instructions; an instruction can belong to none of them, or to two (every fma is simd_fp, too).
 * The counts are kept per translated block without locks: they are exact for a program of one thread.
 *
 * The declarations are those of version 1 of the plugin interface (QEMU 7.2), whose header Debian does not ship.
 */
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_info;
enum { INLINE_ADD = 0 };

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *block, size_t number);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *instruction);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*translated)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int operation, void *counter, uint64_t amount);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id id, void (*called)(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t,
                                                                       uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));

EXPORT int qemu_plugin_version = 1;
EXPORT int qemu_plugin_install(plugin_id id, const struct qemu_info *info, int count, char **arguments);

enum { GETPGID = 155, MARK = 0x454447 };
enum { INSTRUCTIONS, LOAD_STORE, BRANCH, SIMD_FP, FMA, INTEGER_MAC, DOT, MMLA, SVE, CLASSES };
static const char *const names[CLASSES] = {"instructions", "load_store", "branch", "simd_fp", "fma",
                                           "integer_mac",  "dot",        "mmla",   "sve"};
static uint64_t counts[CLASSES], at_beginning[CLASSES];
static FILE *out;

/* An encoding: the bits that matter, and what they are. The letters are those of the Arm manual, chapter C4. */
struct pattern {
    uint32_t mask, value;
    int class;
};

static const struct pattern patterns[] = {
    {0x0A000000, 0x08000000, LOAD_STORE},  /* op0 = x1x0 */
    {0x7C000000, 0x14000000, BRANCH},      /* B, BL */
    {0x7E000000, 0x34000000, BRANCH},      /* CBZ, CBNZ */
    {0x7E000000, 0x36000000, BRANCH},      /* TBZ, TBNZ */
    {0xFE000000, 0x54000000, BRANCH},      /* B.cond */
    {0xFE000000, 0xD6000000, BRANCH},      /* BR, BLR, RET */
    {0x0E000000, 0x0E000000, SIMD_FP},     /* op0 = x111 */
    {0xFF000000, 0x1F000000, FMA},         /* FMADD, FMSUB, FNMADD, FNMSUB */
    {0xBF20FC00, 0x0E20CC00, FMA},         /* FMLA, FMLS */
    {0xBF60FC00, 0x0E400C00, FMA},         /* the same, of half precision */
    {0xAF80B400, 0x0F801000, FMA},         /* FMLA, FMLS by element */
    {0xAFC0B400, 0x0F001000, FMA},         /* the same, of half precision */
    {0x9F20FC00, 0x0E209400, INTEGER_MAC}, /* MLA, MLS */
    {0xBF00B400, 0x2F000000, INTEGER_MAC}, /* MLA, MLS by element */
    {0x9F20DC00, 0x0E208000, INTEGER_MAC}, /* SMLAL, UMLAL, SMLSL, UMLSL */
    {0x9F00B400, 0x0F002000, INTEGER_MAC}, /* the same, by element */
    {0x9F20FC00, 0x0E009400, DOT},         /* SDOT, UDOT */
    {0x9F00F400, 0x0F00E000, DOT},         /* SDOT, UDOT by element */
    {0xBF20FC00, 0x0E009C00, DOT},         /* USDOT */
    {0xBF40F400, 0x0F00F000, DOT},         /* USDOT, SUDOT by element */
    {0xDFE0FC00, 0x4E80A400, MMLA},        /* SMMLA, UMMLA */
    {0xFFE0FC00, 0x4E80AC00, MMLA},        /* USMMLA */
    {0x1E000000, 0x04000000, SVE},         /* op0 = 0010 */
};

/* The classes of an instruction, a bit each. */
static unsigned classes_of(uint32_t word)
{
    unsigned classes = 1U << INSTRUCTIONS;
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++)
        if ((word & patterns[i].mask) == patterns[i].value)
            classes |= 1U << patterns[i].class;
    return classes;
}

static void count_block(plugin_id id, struct qemu_plugin_tb *block)
{
    uint64_t found[CLASSES] = {0};
    (void)id;
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); i++) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
        unsigned classes = classes_of(word);
        for (int class = 0; class < CLASSES; class++)
            found[class] += classes >> class & 1;
    }
    for (int class = 0; class < CLASSES; class++)
        if (found[class])
            qemu_plugin_register_vcpu_tb_exec_inline(block, INLINE_ADD, &counts[class], found[class]);
}

static void end_region(unsigned region)
{
    fprintf(out, "{\"region\": %u", region);
    for (int class = 0; class < CLASSES; class++)
        fprintf(out, ", \"%s\": %" PRIu64, names[class], counts[class] - at_beginning[class]);
    fprintf(out, "}\n");
    fflush(out); /* what was counted before a crash stays */
}

static void see_call(plugin_id id, unsigned cpu, int64_t number, uint64_t first, uint64_t a2, uint64_t a3, uint64_t a4, uint64_t a5,
                     uint64_t a6, uint64_t a7, uint64_t a8)
{
    (void)id, (void)cpu, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != GETPGID || first >> 8 != MARK)
        return;
    unsigned mark = first & 0xFF;
    if (mark % 2)
        end_region(mark - 1);
    else
        memcpy(at_beginning, counts, sizeof counts);
}

int qemu_plugin_install(plugin_id id, const struct qemu_info *info, int count, char **arguments)
{
    (void)info;
    for (int i = 0; i < count; i++)
        if (!strncmp(arguments[i], "out=", 4))
            out = fopen(arguments[i] + 4, "w");
    if (!out) {
        fprintf(stderr, "The counting plugin cannot write the file that its argument `out` names.\n");
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, count_block);
    qemu_plugin_register_vcpu_syscall_cb(id, see_call);
    return 0;
}
