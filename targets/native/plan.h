/* What the native runners share: they read a plan, feed the runtime with speech, time it, and say what they saw.
 *
 * The contract - plan.txt, feed.bin, answers.bin and the line of JSON - stands in edgefuse_devices/plan.py. A runner is started
 * with one argument, the folder of the plan. It ends with 2 where the plan is at fault, with 3 where the runtime cannot load the
 * artifact, with 4 where a call fails; the last line of stderr is the reason.
 *
 * Harmless system calls mark regions for an emulator that counts instructions (see count.c); elsewhere they cost nothing that is
 * timed, since they stand outside the reading of the clock.
 */
#ifndef EDGEFUSE_PLAN_H
#define EDGEFUSE_PLAN_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PLAN_IS_WRONG = 2, CANNOT_LOAD = 3, CANNOT_RUN = 4 };
enum { NAME_BYTES = 128, MOST_TENSORS = 512, NOT_RENEWED = -1 };
enum mark { CALL, CALLED, LOAD, LOADED, RELOAD, RELOADED };

struct input {
    char name[NAME_BYTES];
    size_t floats;
    char becomes[NAME_BYTES]; /* of a cache: the output that it becomes */
    int renewed;              /* the number of that output, or NOT_RENEWED */
};

struct output {
    char name[NAME_BYTES];
    size_t floats;
};

struct plan {
    char model[NAME_BYTES], entry[NAME_BYTES];
    struct input inputs[MOST_TENSORS];
    struct output outputs[MOST_TENSORS]; /* the first one is the answer */
    int input_count, output_count;
    size_t calls;       /* of one pass through the feed */
    bool *begins;       /* of each call: whether an utterance begins */
    const float **feed; /* of each call: where its inputs stand */
    int64_t warm_up_calls, warm_up_ns;
    int64_t least_calls, least_ns, most_calls, most_ns;
    int threads;
    int64_t pace_ns;
};

/* What a runtime does for us. A function that fails ends the process, with a sentence on stderr. */
struct runtime {
    const char *version;
    void (*prepare)(const struct plan *plan); /* what is done once in a process, and timed by nobody; may be NULL */
    void *(*load)(const struct plan *plan); /* everything up to the first call */
    void (*give)(void *loaded, int input, const float *values);
    void (*renew)(void *loaded, int input, int output); /* a cache becomes what the last call made of it */
    void (*call)(void *loaded);                         /* nothing but the call: this is what is timed */
    void (*take)(void *loaded, int output, float *values);
    void (*release)(void *loaded);
};

__attribute__((format(printf, 2, 3), noreturn)) static inline void fail(int code, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    fflush(stdout);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    va_end(values);
    _exit(code); /* without the runtimes' own clearing up, which may crash after a failure and hide the reason */
}

/* ---- reading ---- */

static inline const char *next_word(char **rest)
{
    const char *word = strtok_r(NULL, " \n", rest);
    if (!word)
        fail(PLAN_IS_WRONG, "A line of plan.txt ends too early.");
    return word;
}

static inline void next_name(char **rest, char *name)
{
    const char *word = next_word(rest);
    if (strlen(word) >= NAME_BYTES)
        fail(PLAN_IS_WRONG, "A name in plan.txt is too long: %s.", word);
    strcpy(name, word);
}

static inline int64_t next_number(char **rest)
{
    const char *word = next_word(rest);
    char *end = NULL;
    errno = 0;
    int64_t number = strtoll(word, &end, 10);
    if (errno || *end || number < 0)
        fail(PLAN_IS_WRONG, "plan.txt has %s where a number belongs.", word);
    return number;
}

static inline void *zeros(size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size);
    if (!memory)
        fail(PLAN_IS_WRONG, "There is no memory for the plan.");
    return memory;
}

static inline void read_input(struct plan *plan, char **rest)
{
    if (plan->input_count == MOST_TENSORS)
        fail(PLAN_IS_WRONG, "plan.txt has more than %d inputs.", MOST_TENSORS);
    struct input *input = &plan->inputs[plan->input_count++];
    next_name(rest, input->name);
    input->floats = (size_t)next_number(rest);
    const char *how = next_word(rest);
    if (!strcmp(how, "cache"))
        next_name(rest, input->becomes);
    else if (strcmp(how, "fed"))
        fail(PLAN_IS_WRONG, "plan.txt says that %s is %s; it can be fed or a cache.", input->name, how);
}

static inline void read_output(struct plan *plan, char **rest)
{
    if (plan->output_count == MOST_TENSORS)
        fail(PLAN_IS_WRONG, "plan.txt has more than %d outputs.", MOST_TENSORS);
    struct output *output = &plan->outputs[plan->output_count++];
    next_name(rest, output->name);
    output->floats = (size_t)next_number(rest);
}

static inline void read_begins(struct plan *plan, char **rest)
{
    plan->begins = (bool *)zeros(plan->calls, sizeof *plan->begins);
    for (const char *word; (word = strtok_r(NULL, " \n", rest));) {
        size_t call = strtoull(word, NULL, 10);
        if (call >= plan->calls)
            fail(PLAN_IS_WRONG, "plan.txt begins an utterance with call %s, which the feed does not have.", word);
        plan->begins[call] = true;
    }
}

static inline void read_fact(struct plan *plan, const char *fact, char **rest)
{
    if (!strcmp(fact, "edgefuse-plan")) {
        if (next_number(rest) != 1)
            fail(PLAN_IS_WRONG, "plan.txt is of another version.");
    } else if (!strcmp(fact, "model")) {
        next_name(rest, plan->model);
    } else if (!strcmp(fact, "entry")) {
        next_name(rest, plan->entry);
    } else if (!strcmp(fact, "input")) {
        read_input(plan, rest);
    } else if (!strcmp(fact, "output")) {
        read_output(plan, rest);
    } else if (!strcmp(fact, "calls")) {
        plan->calls = (size_t)next_number(rest);
    } else if (!strcmp(fact, "begins")) {
        read_begins(plan, rest);
    } else if (!strcmp(fact, "warm_up")) {
        plan->warm_up_calls = next_number(rest);
        plan->warm_up_ns = next_number(rest);
    } else if (!strcmp(fact, "measure")) {
        plan->least_calls = next_number(rest);
        plan->least_ns = next_number(rest);
        plan->most_calls = next_number(rest);
        plan->most_ns = next_number(rest);
    } else if (!strcmp(fact, "threads")) {
        plan->threads = (int)next_number(rest);
    } else if (!strcmp(fact, "pace_ns")) {
        plan->pace_ns = next_number(rest);
    } else {
        fail(PLAN_IS_WRONG, "plan.txt speaks of %s, which this runner does not know.", fact);
    }
}

static inline void link_caches(struct plan *plan)
{
    for (int i = 0; i < plan->input_count; i++) {
        struct input *input = &plan->inputs[i];
        input->renewed = NOT_RENEWED;
        if (!*input->becomes)
            continue;
        for (int o = 0; o < plan->output_count; o++)
            if (!strcmp(plan->outputs[o].name, input->becomes) && plan->outputs[o].floats == input->floats)
                input->renewed = o;
        if (input->renewed == NOT_RENEWED)
            fail(PLAN_IS_WRONG, "The cache %s cannot become %s.", input->name, input->becomes);
    }
}

/* Whether a call is given an input by the feed; if not, it is what the call before made of it. */
static inline bool is_fed(const struct plan *plan, size_t call, int input)
{
    return plan->begins[call] || plan->inputs[input].renewed == NOT_RENEWED;
}

static inline void read_feed(struct plan *plan)
{
    FILE *file = fopen("feed.bin", "rb");
    struct stat found;
    if (!file || fstat(fileno(file), &found))
        fail(PLAN_IS_WRONG, "feed.bin cannot be read: %s.", strerror(errno));
    float *content = (float *)zeros((size_t)found.st_size, 1);
    if (fread(content, 1, (size_t)found.st_size, file) != (size_t)found.st_size)
        fail(PLAN_IS_WRONG, "feed.bin cannot be read to its end.");
    fclose(file);
    plan->feed = (const float **)zeros(plan->calls, sizeof *plan->feed);
    size_t floats = 0;
    for (size_t call = 0; call < plan->calls; call++) {
        plan->feed[call] = content + floats;
        for (int i = 0; i < plan->input_count; i++)
            if (is_fed(plan, call, i))
                floats += plan->inputs[i].floats;
    }
    if (floats * sizeof *content != (size_t)found.st_size)
        fail(PLAN_IS_WRONG, "feed.bin has %zu bytes where the plan needs %zu.", (size_t)found.st_size, floats * sizeof *content);
}

static inline void read_plan(struct plan *plan)
{
    FILE *file = fopen("plan.txt", "r");
    if (!file)
        fail(PLAN_IS_WRONG, "plan.txt cannot be read: %s.", strerror(errno));
    char *line = NULL;
    size_t room = 0;
    while (getline(&line, &room, file) >= 0) {
        char *rest = NULL;
        const char *fact = strtok_r(line, " \n", &rest);
        if (fact)
            read_fact(plan, fact, &rest);
    }
    free(line);
    fclose(file);
    if (!*plan->model || !*plan->entry || !plan->input_count || !plan->output_count || !plan->begins || !plan->threads)
        fail(PLAN_IS_WRONG, "plan.txt is not whole.");
    if (!plan->calls || !plan->begins[0])
        fail(PLAN_IS_WRONG, "Call 0 of the plan does not begin an utterance.");
    link_caches(plan);
    read_feed(plan);
}

/* ---- timing ---- */

static inline int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline void sleep_until(int64_t when_ns)
{
    struct timespec when;
    when.tv_sec = (time_t)(when_ns / 1000000000);
    when.tv_nsec = (long)(when_ns % 1000000000);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL) == EINTR)
        continue;
}

/* No process group has such a number: the system says so, and nothing happens. */
static inline void set_mark(enum mark mark)
{
    syscall(SYS_getpgid, 0x45444700L | (long)mark);
}

/* A load from the disk, not from the system's memory, as far as the system follows the advice. */
static inline void forget_pages(const char *path)
{
    int file = open(path, O_RDONLY);
    if (file < 0)
        fail(PLAN_IS_WRONG, "%s cannot be read: %s.", path, strerror(errno));
    fdatasync(file); /* pages that have not been written yet would stay */
    posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    close(file);
}

static inline void *timed_load(const struct runtime *runtime, const struct plan *plan, enum mark begin, int64_t *load_ns)
{
    set_mark(begin);
    int64_t start = now_ns();
    void *loaded = runtime->load(plan);
    *load_ns = now_ns() - start;
    set_mark(begin == LOAD ? LOADED : RELOADED);
    return loaded;
}

static inline int64_t timed_call(const struct runtime *runtime, const struct plan *plan, void *loaded, size_t call)
{
    const float *values = plan->feed[call];
    for (int i = 0; i < plan->input_count; i++) {
        if (!is_fed(plan, call, i)) {
            runtime->renew(loaded, i, plan->inputs[i].renewed);
            continue;
        }
        runtime->give(loaded, i, values);
        values += plan->inputs[i].floats;
    }
    set_mark(CALL);
    int64_t start = now_ns();
    runtime->call(loaded);
    int64_t latency = now_ns() - start;
    set_mark(CALLED);
    return latency;
}

/* ---- what is seen ---- */

struct sight {
    int64_t cold_load_ns, warm_load_ns, first_ns, warm_up_calls;
    int64_t *latency_ns;
    size_t timed, room;
    bool capped;
    int64_t unsteady;
    float *answers; /* of one pass */
    float *answer;  /* of the last call */
    int64_t before_bytes, peak_bytes;
};

/* A line of /proc/self/status, in bytes: of this process's own pages, which getrusage mixes with those before exec. */
static inline int64_t memory_bytes(const char *what)
{
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    int64_t kib = 0;
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, what, strlen(what)))
            kib = strtoll(line + strlen(what), NULL, 10);
    if (file)
        fclose(file);
    return kib * 1024;
}

/* Everything that is written while the clock runs is written to once before, so that it costs no page fault then. */
static inline void make_room(const struct plan *plan, struct sight *sight)
{
    size_t floats = plan->outputs[0].floats;
    sight->room = (size_t)plan->most_calls > plan->calls ? (size_t)plan->most_calls : plan->calls;
    sight->latency_ns = (int64_t *)zeros(sight->room, sizeof *sight->latency_ns);
    sight->answers = (float *)zeros(plan->calls * floats, sizeof *sight->answers);
    sight->answer = (float *)zeros(floats, sizeof *sight->answer);
    memset(sight->latency_ns, 1, sight->room * sizeof *sight->latency_ns);
    memset(sight->answers, 1, plan->calls * floats * sizeof *sight->answers);
}

static inline void warm_up(const struct runtime *runtime, const struct plan *plan, void *loaded, struct sight *sight)
{
    int64_t start = now_ns();
    while (sight->warm_up_calls < plan->warm_up_calls || now_ns() - start < plan->warm_up_ns || !sight->warm_up_calls) {
        if (plan->pace_ns)
            sleep_until(start + sight->warm_up_calls * plan->pace_ns);
        int64_t latency = timed_call(runtime, plan, loaded, (size_t)sight->warm_up_calls % plan->calls);
        if (!sight->warm_up_calls++)
            sight->first_ns = latency;
    }
}

static inline void keep_answer(const struct runtime *runtime, const struct plan *plan, void *loaded, struct sight *sight)
{
    size_t floats = plan->outputs[0].floats;
    float *first = sight->answers + sight->timed % plan->calls * floats;
    if (sight->timed < plan->calls) {
        runtime->take(loaded, 0, first);
        return;
    }
    runtime->take(loaded, 0, sight->answer);
    sight->unsteady += memcmp(first, sight->answer, floats * sizeof *first) != 0;
}

/* One pass is always finished, since every answer is judged; then both a count and a duration are reached, or a cap. */
static inline bool goes_on(const struct plan *plan, struct sight *sight, int64_t elapsed_ns)
{
    int64_t timed = (int64_t)sight->timed;
    if (sight->timed < plan->calls)
        return true;
    if (timed >= plan->least_calls && elapsed_ns >= plan->least_ns)
        return false;
    sight->capped = timed >= plan->most_calls || (plan->most_ns && elapsed_ns >= plan->most_ns);
    return !sight->capped;
}

static inline void measure(const struct runtime *runtime, const struct plan *plan, void *loaded, struct sight *sight)
{
    int64_t start = now_ns();
    while (goes_on(plan, sight, now_ns() - start)) {
        if (plan->pace_ns)
            sleep_until(start + (int64_t)sight->timed * plan->pace_ns);
        sight->latency_ns[sight->timed] = timed_call(runtime, plan, loaded, sight->timed % plan->calls);
        keep_answer(runtime, plan, loaded, sight);
        sight->timed++;
    }
}

static inline void write_answers(const struct plan *plan, const struct sight *sight)
{
    size_t floats = plan->calls * plan->outputs[0].floats;
    FILE *file = fopen("answers.bin", "wb");
    if (!file || fwrite(sight->answers, sizeof(float), floats, file) != floats || fclose(file))
        fail(CANNOT_RUN, "answers.bin cannot be written: %s.", strerror(errno));
}

static inline void say(const struct runtime *runtime, const struct sight *sight)
{
    printf("{\"schema\": 1, \"runtime\": \"%s\"", runtime->version);
    printf(", \"cold_load_ns\": %" PRId64 ", \"warm_load_ns\": %" PRId64, sight->cold_load_ns, sight->warm_load_ns);
    printf(", \"first_ns\": %" PRId64 ", \"warm_up_calls\": %" PRId64, sight->first_ns, sight->warm_up_calls);
    printf(", \"capped\": %s, \"unsteady\": %" PRId64, sight->capped ? "true" : "false", sight->unsteady);
    printf(", \"peak_bytes\": %" PRId64 ", \"before_bytes\": %" PRId64, sight->peak_bytes, sight->before_bytes);
    printf(", \"latency_ns\": [");
    for (size_t i = 0; i < sight->timed; i++)
        printf("%s%" PRId64, i ? ", " : "", sight->latency_ns[i]);
    printf("]}\n");
    fflush(stdout);
}

/* The whole life of a runner. */
static inline int follow_plan(const struct runtime *runtime, int argument_count, char **arguments)
{
    static struct plan plan;
    static struct sight sight;
    if (argument_count != 2)
        fail(PLAN_IS_WRONG, "A runner takes one argument, the folder of a plan.");
    if (chdir(arguments[1]))
        fail(PLAN_IS_WRONG, "%s cannot be entered: %s.", arguments[1], strerror(errno));
    read_plan(&plan);
    make_room(&plan, &sight);
    if (runtime->prepare)
        runtime->prepare(&plan);
    forget_pages(plan.model);
    sight.before_bytes = memory_bytes("VmRSS:");
    void *loaded = timed_load(runtime, &plan, LOAD, &sight.cold_load_ns);
    warm_up(runtime, &plan, loaded, &sight);
    measure(runtime, &plan, loaded, &sight);
    sight.peak_bytes = memory_bytes("VmHWM:"); /* before a second instance is there */
    runtime->release(timed_load(runtime, &plan, RELOAD, &sight.warm_load_ns));
    write_answers(&plan, &sight);
    say(runtime, &sight);
    _exit(0); /* the first instance goes with the process; taking the runtime apart is nobody's concern */
}

#endif
