// One side of train_step.py: a training step of llm.c for each line of standard input.
//
// What llm.c's own program has fixed (4 rows of 64 tokens, its files, 40 steps) comes from the command line
// here; the functions are its own. TESTING leaves out its main, as its tests do.
//
//     llmc_step CHECKPOINT IDS ROWS CONTEXT PEAK_LEARNING_RATE WARMUP_STEPS

#include <fcntl.h>

#define TESTING
#include "train_gpt2.c"

static double seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static double peak_bytes(void) {
    double kilobytes = 0;
    char line[256];
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status)) {
        if (strncmp(line, "VmHWM:", 6) == 0) { kilobytes = atof(line + 6); }
    }
    if (status) { fclose(status); }
    return kilobytes * 1024;
}

static int *read_ids(const char *path, size_t *count) {
    FILE *file = fopenCheck(path, "rb");
    fseekCheck(file, 0, SEEK_END);
    *count = ftell(file) / sizeof(int);
    fseekCheck(file, 0, SEEK_SET);
    int *ids = (int *)mallocCheck(*count * sizeof(int));
    freadCheck(ids, sizeof(int), *count, file);
    fcloseCheck(file);
    return ids;
}

int main(int argc, char **argv) {
    assert(argc == 7);
    FILE *answers = fdopen(dup(1), "w");
    dup2(open("/dev/null", O_WRONLY), 1);  // what llm.c prints must not come between the answers
    GPT2 model;
    gpt2_build_from_checkpoint(&model, argv[1]);
    size_t count, rows = atoi(argv[3]), context = atoi(argv[4]), tokens = rows * context;
    int *ids = read_ids(argv[2], &count);
    double peak_rate = atof(argv[5]), warmup_steps = atof(argv[6]);
    int threads = 1;
#ifdef OMP
    threads = omp_get_max_threads();
#endif
    fprintf(answers, "{\"precision\": \"fp32\", \"threads\": %d}\n", threads);
    fflush(answers);
    double waiting_since = seconds(CLOCK_MONOTONIC), cpu_before = seconds(CLOCK_PROCESS_CPUTIME_ID);
    char line[256];
    for (size_t step = 0; fgets(line, sizeof line, stdin); step++) {
        double started_at = seconds(CLOCK_MONOTONIC), cpu_at_start = seconds(CLOCK_PROCESS_CPUTIME_ID);
        assert((step + 1) * tokens < count);
        int *inputs = ids + step * tokens;
        gpt2_forward(&model, inputs, inputs + 1, rows, context);
        gpt2_zero_grad(&model);
        gpt2_backward(&model);
        double share = (step + 1) / warmup_steps;
        gpt2_update(&model, peak_rate * (share < 1 ? share : 1), 0.9f, 0.95f, 1e-8f, 0.1f, step + 1);
        double ended_at = seconds(CLOCK_MONOTONIC);
        fprintf(answers,
                "{\"milliseconds\": %.3f, \"losses\": [%.6f], \"peak_bytes\": %.0f, "
                "\"waited_seconds\": %.6f, \"waited_cpu_seconds\": %.6f}\n",
                (ended_at - started_at) * 1e3, model.mean_loss, peak_bytes(),
                started_at - waiting_since, cpu_at_start - cpu_before);
        fflush(answers);
        waiting_since = seconds(CLOCK_MONOTONIC);
        cpu_before = seconds(CLOCK_PROCESS_CPUTIME_ID);
    }
    gpt2_free(&model);
    free(ids);
    return 0;
}
