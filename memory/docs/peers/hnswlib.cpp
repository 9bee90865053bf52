// Measures hnswlib on the vectors that `bench_index --out FOLDER` wrote, building on many threads.
// Knows nothing of mka: it reads rows, queries and exact answers from files.
//
//     pip download --no-deps --no-binary :all: hnswlib==0.8.0 && tar xzf hnswlib-0.8.0.tar.gz
//     g++ -O3 -march=native -pthread -I hnswlib-0.8.0 memory/docs/peers/hnswlib.cpp -o hnswlib
//     ./hnswlib FOLDER/1000000 THREADS
//
// Prints, for each ef, recall_at_10 and the median microseconds of one query, by the processor clock of the one thread
// that searches, as bench_index does.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <string>
#include <thread>
#include <unordered_set>
#include <vector>

#include "hnswlib/hnswlib.h"

static const size_t DIM = 384, K = 10, M = 16, EF_CONSTRUCTION = 200;

template <typename T> static std::vector<T> read_all(const std::string& path) {
    FILE* file = std::fopen(path.c_str(), "rb");
    if (!file) {
        std::fprintf(stderr, "%s: expected a file that can be read\n", path.c_str());
        std::exit(1);
    }
    std::fseek(file, 0, SEEK_END);
    std::vector<T> numbers(std::ftell(file) / sizeof(T));
    std::rewind(file);
    size_t num_read = std::fread(numbers.data(), sizeof(T), numbers.size(), file);
    std::fclose(file);
    numbers.resize(num_read);
    return numbers;
}

static double seconds(clockid_t clock) {
    timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

int main(int argc, char** argv) {
    if (argc != 3) {
        std::fprintf(stderr, "expected a folder of rows.f32, queries.f32 and exact.u32, and a number of threads\n");
        return 1;
    }
    const std::string folder = argv[1];
    const size_t num_threads = std::max(1, std::atoi(argv[2]));
    const auto rows = read_all<float>(folder + "/rows.f32");
    auto queries = read_all<float>(folder + "/queries.f32");
    const auto exact = read_all<unsigned>(folder + "/exact.u32");
    const size_t num_rows = rows.size() / DIM, num_queries = queries.size() / DIM;
    for (size_t at = 0; at < num_queries; at++) {
        float* query = &queries[at * DIM];
        float length = 0;
        for (size_t i = 0; i < DIM; i++) length += query[i] * query[i];
        for (size_t i = 0; i < DIM; i++) query[i] /= std::sqrt(length);
    }

    // Inner products of unit vectors: the cosine without scaling every query once more.
    hnswlib::InnerProductSpace space(DIM);
    hnswlib::HierarchicalNSW<float> graph(&space, num_rows, M, EF_CONSTRUCTION, 1);
    double wall = seconds(CLOCK_MONOTONIC), cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
    std::atomic<size_t> next{1};
    graph.addPoint(&rows[0], 0);
    auto work = [&] {
        for (size_t row; (row = next++) < num_rows;) {
            graph.addPoint(&rows[row * DIM], row);
            if (row % 100000 == 0) {
                std::fprintf(stderr, "%zu rows in %.0f s\n", row, seconds(CLOCK_MONOTONIC) - wall);
            }
        }
    };
    std::vector<std::thread> threads;
    for (size_t at = 0; at < num_threads; at++) threads.emplace_back(work);
    for (auto& thread : threads) thread.join();
    wall = seconds(CLOCK_MONOTONIC) - wall;
    cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    std::printf("hnswlib graph of %zu rows: %.0f s wall on %zu threads, %.0f s of processor\n", num_rows, wall, num_threads, cpu);

    std::printf("| rows | library | rows/s in | setting | recall_at_10 | µs |\n|---|---|---|---|---|---|\n");
    for (size_t ef : {10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 400, 640}) {
        graph.setEf(ef);
        std::vector<double> micros;
        size_t hits = 0;
        for (int round = 0; round < 3; round++) {
            for (size_t at = 0; at < num_queries; at++) {
                const double start = seconds(CLOCK_THREAD_CPUTIME_ID);
                auto found = graph.searchKnn(&queries[at * DIM], K);
                const double taken = seconds(CLOCK_THREAD_CPUTIME_ID) - start;
                if (round == 0) continue;
                micros.push_back(taken * 1e6);
                std::unordered_set<unsigned> answers(&exact[at * K], &exact[at * K] + K);
                for (; !found.empty(); found.pop()) hits += answers.count(found.top().second);
            }
        }
        std::sort(micros.begin(), micros.end());
        const double recall = double(hits) / (2 * num_queries * K);
        std::printf("| %zu | hnswlib M%zu efc%zu | %.0f | ef %zu | %.4f | %.1f |\n", num_rows, M, EF_CONSTRUCTION,
                    num_rows / cpu, ef, recall, micros[micros.size() / 2]);
        std::fflush(stdout);
        if (recall >= 0.99) break;
    }
}
