// The forward pass of GPT for serving on a CPU: rows of tokens in, logits out. It computes both families, with weights
// in float32, bfloat16 or int8 and activations in float32 (rounded to bfloat16 for its pairs), and reads every weight from memory
// once per step.
//
// A row is one token of one slot at one position. Each row is computed on its own, and the other rows do not change the
// order of its additions, so a token gets the same bits alone, in a full batch, in a prompt's chunk, or as a draft.
//
// `multiply` computes every product, also the two of attention. Its matrices are stored in panels, [panel][input]
// [PANEL outputs], so that memory is read in order and a vector register holds neighbouring outputs.
//
// GCC and Clang compile their vector types to AVX2, AVX-512 or NEON, whichever the machine has. Where it has matrix
// units (AMX), `multiply_split` multiplies bfloat16 weights, and takes each activation as a sum of two bfloat16 numbers.
// Where it adds up products of bfloat16 pairs (AVX512_BF16), a `multiply_tile` of its own takes bfloat16 weights and
// activations rounded to bfloat16, as a training has them: twice as many products as in float32.
//
// `summarise_logits` at the end is for those who score texts: many rows of logits, of which each text needs one number.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <type_traits>

#if defined(__AVX512BF16__)
#define HAS_PAIRS
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int MAX_ROWS = 14;  // rows a register tile holds: 14 rows x 2 vectors leave room in 32 registers
#else
constexpr int LANES = 8;
constexpr int MAX_ROWS = 6;  // of 16 registers; NEON has 32, of half the size
#endif
constexpr int PANEL = 2 * LANES;
constexpr int FEW_ROWS = 6;    // rows x panels whose sums hide the latency of an addition
constexpr int BLOCK_ROWS = 8;  // rows whose keys and values one thread stores after another

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef int16_t Shorts __attribute__((vector_size(LANES * 2)));

enum Type { FLOAT32, BFLOAT16, INT8 };
enum Layout { PANELS, TILES, PAIRS };  // of weights; TILES and PAIRS lie alike, and differ in how they are multiplied

// -- Threads ----------------------------------------------------------------------------------------------------------

// Threads that share the items of one stage after another. Whichever thread is free takes the next item, and a stage
// ends when its items are done, not when every thread has come by: a thread that a busy machine does not schedule holds
// up nobody. A pass says how many threads take part; those that it does not need sleep on.
class Crew {
   public:
    int threads() const { return threads_; }

    void wake(int threads) {
        threads_ = threads;
        for (; started_ < threads; ++started_) std::thread([this, thread = started_] { help(thread); }).detach();
        awake_.store(threads);
        awake_.notify_all();
    }
    void rest() { awake_.store(0); }

    // Call work(item, thread) for every item, on any thread.
    template <class Work> void share(int items, const Work& work) {
        if (items <= 1 || threads_ == 1) {
            for (int item = 0; item < items; ++item) work(item, 0);
            return;
        }
        call_ = [](const void* context, int item, int thread) { (*(const Work*)context)(item, thread); };
        context_ = &work;
        done_.store(0, std::memory_order_relaxed);
        ticket_.store((uint64_t)threads_ << 2 * BITS | (uint64_t)items << BITS, std::memory_order_release);
        while (take(0)) {
        }
        for (int spins = 0; done_.load(std::memory_order_acquire) != items;) pause(spins);
    }

   private:
    static constexpr int BITS = 20;
    static constexpr uint64_t MASK = (1 << BITS) - 1;

    bool take(int thread) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        do {
            if ((ticket & MASK) == (ticket >> BITS & MASK)) return false;
            // One that went on looking after a pass of more threads: this pass has no memory for it.
            if (thread >= (int)(ticket >> 2 * BITS)) return false;
        } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire));
        // The stage cannot end before this item is done, so what it calls stays as it is.
        call_(context_, ticket & MASK, thread);
        done_.fetch_add(1, std::memory_order_release);
        return true;
    }

    void help(int thread) {
        for (;;) {
            const int awake = awake_.load();
            if (awake <= thread) {
                awake_.wait(awake);
                continue;
            }
            for (int spins = 0; awake_.load(std::memory_order_relaxed) > thread;)
                if (take(thread))
                    spins = 0;
                else
                    pause(spins);
        }
    }

    static void pause(int& spins) {
        if (++spins > 1000) std::this_thread::yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }

    int threads_ = 1;  // that take part in this pass, the caller's among them
    int started_ = 1;
    std::atomic<uint64_t> ticket_{0};  // of a stage: how many threads may take its items, how many it has, the next one
    std::atomic<int> done_{0};
    std::atomic<int> awake_{0};  // threads with numbers below this look for items
    void (*call_)(const void*, int, int) = nullptr;
    const void* context_ = nullptr;
};

// -- Numbers as they lie in memory ------------------------------------------------------------------------------------

template <class T> T read(const void* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

// Read PANEL neighbours into two vectors; `write_panel` writes two such vectors in their order.
inline void read_panel(const float* at, Floats& first, Floats& second) {
    first = read<Floats>(at);
    second = read<Floats>(at + LANES);
}
inline void read_panel(const uint16_t* at, Floats& even, Floats& odd) {
    // A bfloat16 is the upper half of a float32: one load gives the even neighbours and the odd ones.
    const Ints pairs = read<Ints>(at);
    even = (Floats)(pairs << 16);
    odd = (Floats)(pairs & (int32_t)0xffff0000);
}
inline void read_panel(const int8_t* at, Floats& even, Floats& odd) {
    const Ints pairs = __builtin_convertvector(read<Shorts>(at), Ints);
    even = __builtin_convertvector(pairs << 24 >> 24, Floats);
    odd = __builtin_convertvector(pairs >> 8, Floats);
}

template <class T> void write_panel(float* at, Floats first, Floats second) {
    if (sizeof(T) < sizeof(float)) {
        for (int lane = 0; lane < LANES; ++lane) at[2 * lane] = first[lane], at[2 * lane + 1] = second[lane];
    } else {
        std::memcpy(at, &first, sizeof first);
        std::memcpy(at + LANES, &second, sizeof second);
    }
}

// The bits of the nearest bfloat16 in their upper half, ties to even.
inline Ints round_bits(Floats values) {
    const Ints bits = (Ints)values;
    return bits + 0x7fff + (bits >> 16 & 1);
}

// LANES values in the precision of the cache.
inline void write_cache(float* at, Floats values) { std::memcpy(at, &values, sizeof values); }
inline void write_cache(uint16_t* at, Floats values) {
    const Shorts upper = __builtin_convertvector(round_bits(values) >> 16, Shorts);
    std::memcpy(at, &upper, sizeof upper);
}
// Round `n` numbers of a row to bfloat16, and write zeros up to `padded`.
inline void round_row(const float* x, int n, int padded, uint16_t* line) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) write_cache(line + i, read<Floats>(x + i));
    for (; i < n; ++i) {
        const uint32_t bits = read<uint32_t>(x + i);
        line[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    for (; i < padded; ++i) line[i] = 0;
}
inline float load(const float* at) { return *at; }
inline float load(const uint16_t* at) {
    const uint32_t bits = uint32_t(*at) << 16;
    return read<float>(&bits);
}

// -- The product ------------------------------------------------------------------------------------------------------

// out[row][output] = sum over inputs of x[row][input] * panels[input][output], inputs in order, for ROWS rows and
// PANELS panels. These are so few that the sums stay in registers, and so many that they hide the latency of an
// addition. The weights that lie `ahead` are fetched from memory meanwhile. An input's outputs of a panel lie
// `input_stride` behind those of the input before.
template <int ROWS, int PANELS, class T>
void multiply_tile(const T* panels, long panel_stride, long input_stride, int inputs, const float* x, long x_stride,
                   float* out, long out_stride, long ahead) {
    Floats sums[ROWS][PANELS][2] = {};
    for (int input = 0; input < inputs; ++input)
        for (int panel = 0; panel < PANELS; ++panel) {
            Floats first, second;
            const T* at = panels + panel * panel_stride + input * input_stride;
            read_panel(at, first, second);
            __builtin_prefetch(at + ahead, 0, 2);
            for (int row = 0; row < ROWS; ++row) {
                const float scalar = x[row * x_stride + input];
                sums[row][panel][0] += first * scalar;
                sums[row][panel][1] += second * scalar;
            }
        }
    for (int row = 0; row < ROWS; ++row)
        for (int panel = 0; panel < PANELS; ++panel)
            write_panel<T>(out + row * out_stride + panel * PANEL, sums[row][panel][0], sums[row][panel][1]);
}

#if defined(HAS_PAIRS)
// The same for rows of bfloat16, whole tiles of weights (`Layout`), and pairs of inputs: a register holds 16 outputs of
// one pair.
template <int ROWS, int PANELS>
void multiply_tile(const uint16_t* panels, long panel_stride, long, int inputs, const uint16_t* x, long x_stride,
                   float* out, long out_stride, long ahead) {
    constexpr int PAIRS_IN_TILE = PANEL / 2;
    __m512 sums[ROWS][PANELS][2] = {};
    const auto fetch = [&](int input, int pair, int panel, int half) {
        const uint16_t* at = panels + panel * panel_stride + (long)input * PANEL + (half * PAIRS_IN_TILE + pair) * PANEL;
        __builtin_prefetch(at + ahead, 0, 2);
        return (__m512bh)_mm512_loadu_si512(at);
    };
    const auto pair_of = [&](int row, int input, int pair) {
        return (__m512bh)_mm512_set1_epi32(read<int32_t>(x + row * x_stride + input + 2 * pair));
    };
    for (int input = 0; input < inputs; input += PANEL)
        if constexpr (PANELS == 1) {
            // Both halves for one row after another: 28 sums leave registers for a single row's pair.
            for (int pair = 0; pair < PAIRS_IN_TILE; ++pair) {
                const __m512bh lower = fetch(input, pair, 0, 0), upper = fetch(input, pair, 0, 1);
                for (int row = 0; row < ROWS; ++row) {
                    const __m512bh both = pair_of(row, input, pair);
                    sums[row][0][0] = _mm512_dpbf16_ps(sums[row][0][0], both, lower);
                    sums[row][0][1] = _mm512_dpbf16_ps(sums[row][0][1], both, upper);
                }
            }
        } else {
            // Few rows wait for memory, which is read in its order.
            for (int panel = 0; panel < PANELS; ++panel)
                for (int half = 0; half < 2; ++half)
                    for (int pair = 0; pair < PAIRS_IN_TILE; ++pair) {
                        const __m512bh weights = fetch(input, pair, panel, half);
                        for (int row = 0; row < ROWS; ++row)
                            sums[row][panel][half] =
                                _mm512_dpbf16_ps(sums[row][panel][half], pair_of(row, input, pair), weights);
                    }
        }
    for (int row = 0; row < ROWS; ++row)
        for (int panel = 0; panel < PANELS; ++panel)
            for (int half = 0; half < 2; ++half)
                _mm512_storeu_ps(out + row * out_stride + panel * PANEL + half * LANES, sums[row][panel][half]);
}
#endif

template <int ROWS, int PANELS, class T, class X>
void multiply_rows(int rows, const T* panels, long panel_stride, long input_stride, int inputs, const X* x,
                   long x_stride, float* out, long out_stride, long ahead) {
    if (rows == ROWS)
        multiply_tile<ROWS, PANELS>(panels, panel_stride, input_stride, inputs, x, x_stride, out, out_stride, ahead);
    else if constexpr (ROWS > 1)
        multiply_rows<ROWS - 1, PANELS>(rows, panels, panel_stride, input_stride, inputs, x, x_stride, out, out_stride,
                                        ahead);
}

// The same for any number of rows and panels, in tiles of about equal height; low tiles are two or four panels wide.
template <class T, class X>
void multiply(int rows, int num_panels, const T* panels, long panel_stride, int inputs, const X* x, long x_stride,
              float* out, long out_stride, long ahead, long input_stride = PANEL) {
    const int tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int tile = 0, row = 0; tile < tiles; ++tile) {
        const int height = (rows - row + tiles - tile - 1) / (tiles - tile);
        int panel = 0;
        const auto go = [&](auto width) {
            constexpr int PANELS = decltype(width)::value, MOST = PANELS > 1 ? FEW_ROWS / PANELS : MAX_ROWS;
            for (; height <= MOST && panel + PANELS <= num_panels; panel += PANELS)
                multiply_rows<MOST, PANELS>(height, panels + panel * panel_stride, panel_stride, input_stride, inputs,
                                            x + row * x_stride, x_stride, out + row * out_stride + panel * PANEL,
                                            out_stride, ahead);
        };
        go(std::integral_constant<int, 4>());
        go(std::integral_constant<int, 2>());
        go(std::integral_constant<int, 1>());
        row += height;
    }
}

// -- The product by matrix units --------------------------------------------------------------------------------------

constexpr int TILE_ROWS = 16;

// Split a row into two lines of bfloat16 whose sum it is to 16 bits; a float32 has 24, and the weights have 8.
inline void split(const float* x, int n, int padded, uint16_t* upper, uint16_t* lower) {
    for (int i = 0; i < padded; i += LANES) {
        Floats values = {};
        if (i + LANES <= n)
            values = read<Floats>(x + i);
        else
            for (int lane = 0; i + lane < n; ++lane) values[lane] = x[i + lane];
        write_cache(upper + i, values);
        write_cache(lower + i, values - (Floats)(round_bits(values) & (int32_t)0xffff0000));
    }
}

#if defined(HAS_TILES)
struct alignas(64) TileShapes {  // as the processor reads them
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 and 1 are the sums of one panel for the first 8 rows, 2 and 3 for the others; 4 and 5 the weights; 6 and 7
// the rows, two lines for each.
static void shape_tiles(int rows) {
    TileShapes shapes;
    const int first = std::min(rows, TILE_ROWS / 2), others = std::max(rows - first, 1);
    const int lines[] = {2 * first, 2 * first, 2 * others, 2 * others, TILE_ROWS, TILE_ROWS, 2 * first, 2 * others};
    for (int tile = 0; tile < 8; ++tile) {
        shapes.row_bytes[tile] = 64;
        shapes.rows[tile] = lines[tile];
    }
    _tile_loadconfig(&shapes);
}

// out[line][output] for the lines of up to 16 split rows and one panel of whole tiles.
template <bool BOTH>
static void multiply_tiles(const uint16_t* panel, int inputs, const uint16_t* lines, long stride, float* out) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int input = 0; input < inputs; input += PANEL) {
        const uint16_t* at = panel + (long)input * PANEL;
        _tile_loadd(4, at, 2 * PANEL);
        _tile_loadd(6, lines + input, 2 * stride);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(5, at + TILE_ROWS * PANEL, 2 * PANEL);
        _tile_dpbf16ps(1, 6, 5);
        if (BOTH) {
            _tile_loadd(7, lines + TILE_ROWS * stride + input, 2 * stride);
            _tile_dpbf16ps(2, 7, 4);
            _tile_dpbf16ps(3, 7, 5);
        }
#pragma GCC unroll 32
        for (int i = 0; i < PANEL * PANEL; i += PANEL) __builtin_prefetch(at + 4 * PANEL * PANEL + i);
    }
    _tile_stored(0, out, 4 * PANEL);
    _tile_stored(1, out + LANES, 4 * PANEL);
    if (BOTH) {
        _tile_stored(2, out + TILE_ROWS * PANEL, 4 * PANEL);
        _tile_stored(3, out + TILE_ROWS * PANEL + LANES, 4 * PANEL);
    }
}

// sums[row][output] for up to 16 split rows and one panel.
static void multiply_split(int rows, const uint16_t* panel, int inputs, const uint16_t* lines, long stride, float* sums,
                           long sums_stride) {
    alignas(64) float parts[2 * TILE_ROWS][PANEL];
    if (rows > TILE_ROWS / 2)
        multiply_tiles<true>(panel, inputs, lines, stride, parts[0]);
    else
        multiply_tiles<false>(panel, inputs, lines, stride, parts[0]);
    for (int row = 0; row < rows; ++row)
        for (int i = 0; i < PANEL; ++i) sums[row * sums_stride + i] = parts[2 * row][i] + parts[2 * row + 1][i];
}
#else
static void shape_tiles(int) {}
static void multiply_split(int, const uint16_t*, int, const uint16_t*, long, float*, long) {}
#endif

// -- Arithmetic on one row --------------------------------------------------------------------------------------------

inline float sum(Floats values) {
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += values[lane];
    return total;
}

inline Floats exponential(Floats x) {  // within 2 units in the last place on [-87, 87]
    const Floats low = Floats{} - 87.0f, high = Floats{} + 87.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Floats shifted = x * 1.44269504f + magic;
    const Floats power = shifted - magic;
    const Floats r = (x - power * 0.693359375f) + power * 2.12194440e-4f;
    Floats series = r * 1.9875691500e-4f + 1.3981999507e-3f;
    series = series * r + 8.3334519073e-3f;
    series = series * r + 4.1665795894e-2f;
    series = series * r + 1.6666665459e-1f;
    series = series * r + 5.0000001201e-1f;
    series = series * (r * r) + r + 1.0f;
    const Ints exponent = ((Ints)shifted - (Ints)magic) << 23;
    return (Floats)((Ints)series + exponent);
}

// exp((score - highest) * scale), divided by their sum. The buffer has LANES floats more than `n`.
void softmax(float* scores, int n, float scale) {
    for (int i = n; i < n + LANES; ++i) scores[i] = -INFINITY;
    Floats highest = read<Floats>(scores);
    for (int i = LANES; i < n; i += LANES) {
        const Floats part = read<Floats>(scores + i);
        highest = part > highest ? part : highest;
    }
    const float top = *std::max_element((float*)&highest, (float*)&highest + LANES);
    Floats total = {};
    for (int i = 0; i < n; i += LANES) {
        Floats part = exponential((read<Floats>(scores + i) - top) * scale);
        for (int lane = n - i; lane < LANES; ++lane) part[lane] = 0;
        std::memcpy(scores + i, &part, sizeof part);
        total += part;
    }
    const float share = 1 / sum(total);
    for (int i = 0; i < n; i += LANES) {
        const Floats part = read<Floats>(scores + i) * share;
        std::memcpy(scores + i, &part, sizeof part);
    }
}

// Sum of (x - shift)^power, power 1 or 2.
template <int POWER> float moment(const float* x, int n, float shift) {
    Floats totals = {};
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Floats part = read<Floats>(x + i) - shift;
        totals += POWER == 1 ? part : part * part;
    }
    float total = sum(totals);
    for (; i < n; ++i) total += POWER == 1 ? x[i] - shift : (x[i] - shift) * (x[i] - shift);
    return total;
}

// RMSNorm, or LayerNorm where there is a bias.
void normalise(const float* x, int n, const float* weight, const float* bias, float epsilon, float* out) {
    const float mean = bias ? moment<1>(x, n, 0) / n : 0;
    const float scale = 1 / std::sqrt(moment<2>(x, n, mean) / n + epsilon);
    const auto one = [&](auto part, int i) {
        part = (part - mean) * scale * read<decltype(part)>(weight + i);
        if (bias) part += read<decltype(part)>(bias + i);
        std::memcpy(out + i, &part, sizeof part);
    };
    int i = 0;
    for (; i + LANES <= n; i += LANES) one(read<Floats>(x + i), i);
    for (; i < n; ++i) one(x[i], i);
}

void rotate(float* x, int n, const float* cosines, const float* sines) {
    const auto pair = [&](auto first, int i) {
        using Part = decltype(first);
        const auto second = read<Part>(x + i + n / 2);
        const auto cosine = read<Part>(cosines + i), sine = read<Part>(sines + i);
        const Part turned[] = {first * cosine - second * sine, second * cosine + first * sine};
        std::memcpy(x + i, &turned[0], sizeof(Part));
        std::memcpy(x + i + n / 2, &turned[1], sizeof(Part));
    };
    int i = 0;
    for (; i + LANES <= n / 2; i += LANES) pair(read<Floats>(x + i), i);
    for (; i < n / 2; ++i) pair(x[i], i);
}

// -- The model --------------------------------------------------------------------------------------------------------

extern "C" {

struct Linear {
    const void* panels;  // [outputs / PANEL][inputs][PANEL], or in tiles [outputs / PANEL][inputs / 32][2][16][16][2]
    const float* scale;  // per output, for int8
    const float* bias;   // per output, or null
    int32_t inputs, stored_inputs, outputs;  // outputs, and for tiles the stored inputs, in whole panels
};

struct Norm {
    const float *weight, *bias;  // bias: null for RMSNorm; both: null where there is no norm
};

struct Layer {
    Norm attention_norm, query_norm, key_norm, mlp_norm;
    Linear qkv, attention_output, up, mlp_output;
};

struct Model {
    int32_t layout, modern, num_layers, width, heads, kv_heads, head_dim, mlp_width, context, slots;
    int32_t weight_type, cache_type;
    float epsilon;
    const void *embedding, *position_embedding;  // bfloat16 or float32, as the cache
    const float *cosines, *sines;                // [context][head_dim]
    const Layer* layers;
    Norm norm;
    Linear head;
    // Keys [layer][slot][head][position / PANEL][channel][PANEL], values [layer][slot][head][position][channel]: of one
    // text either lies in one piece, and values with their channels in whole panels.
    void *keys, *values;
};

struct Batch {
    int32_t rows, num_logits, threads, vocabulary;
    const int32_t *tokens, *slots, *positions, *logit_rows;
    float* workspace;  // `workspace_floats` of them
    float* logits;     // [num_logits][head.outputs]
    int32_t* best;     // the first place of each row's largest logit, within the vocabulary; -1: `find_best`
};

int32_t panel_width() { return PANEL; }

// Whether there are matrix units and the system lets this process use them.
int32_t has_tiles() {
#if defined(HAS_TILES)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of Linux's arch_prctl
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}

// Whether the processor adds up products of pairs.
int32_t has_pairs() {
#if defined(HAS_PAIRS)
    return 1;
#else
    return 0;
#endif
}
}

constexpr long round_up(long n) { return (n + PANEL - 1) / PANEL * PANEL; }

struct Buffers {  // one line per row; scores: per thread
    float *x, *normed, *qkv, *mixed, *hidden, *scores;
    uint16_t* split;  // two lines per row
    bool rounds;      // whether `split` holds one rounded line per row, for products of pairs
    bool has_prompts;  // whether some slot has several rows
    long width_stride, qkv_stride, mixed_stride, hidden_stride, scores_stride, scores_size, split_stride;
};

static long lay_out(const Model& model, int rows, int threads, float* base, Buffers* buffers) {
    Buffers b{};
    b.qkv_stride = round_up((model.heads + 2 * model.kv_heads) * model.head_dim);
    b.width_stride = round_up(model.width);
    b.mixed_stride = round_up(model.heads * model.head_dim);
    b.hidden_stride = round_up(2 * model.mlp_width) + PANEL;  // `activate` works in whole vectors
    b.scores_stride = round_up(model.context) + PANEL;
    // Of one group of heads: its scores, and its output in whole panels.
    b.scores_size = model.heads / model.kv_heads * (b.scores_stride + round_up(model.head_dim));
    long used = 0;
    const auto take = [&](long count) {
        float* at = base + used;
        used += round_up(count);
        return at;
    };
    b.x = take(rows * b.width_stride);
    b.normed = take(rows * b.width_stride);
    b.qkv = take(rows * b.qkv_stride);
    b.mixed = take(rows * b.mixed_stride);
    b.hidden = take(rows * b.hidden_stride);
    b.scores = take(threads * b.scores_size);
    b.split_stride = round_up(std::max({model.width, model.heads * model.head_dim, model.mlp_width}));
    b.split = (uint16_t*)take(rows * b.split_stride);
    b.rounds = model.layout == PAIRS;
    if (buffers) *buffers = b;
    return used;
}

extern "C" int64_t workspace_floats(const Model* model, int32_t rows, int32_t threads) {
    return lay_out(*model, rows, threads, nullptr, nullptr);
}

// out = (x W) * scale + bias, or added to out.
template <class T>
void apply(Crew& crew, const Model& model, const Buffers& b, const Linear& linear, int rows, const float* x,
           long x_stride, float* out, long out_stride, bool add) {
    const int panels = linear.outputs / PANEL;
    const long panel_stride = (long)linear.stored_inputs * PANEL;
    const long ahead = 2 * crew.threads() * panel_stride;  // the item that this thread is likely to take next
    const bool tiled = std::is_same_v<T, uint16_t> && model.layout == TILES;
    const int most_rows = tiled ? TILE_ROWS : 3 * MAX_ROWS;
    if (tiled)
        crew.share(rows, [&](int row, int) {
            uint16_t* const upper = b.split + 2 * row * b.split_stride;
            split(x + row * x_stride, linear.inputs, linear.stored_inputs, upper, upper + b.split_stride);
        });
    crew.share((panels + 1) / 2, [&](int item, int) {
        const int panel = 2 * item, count = std::min(2, panels - panel);
        const int first = panel * PANEL, last = first + count * PANEL;
        const T* weights = (const T*)linear.panels + panel * panel_stride;
        // A few rows at a time, so that sums are finished while they are in the cache.
        for (int row = 0, shaped = 0; row < rows; row += most_rows) {
            float sums[3 * MAX_ROWS][2 * PANEL];
            const int height = std::min(most_rows, rows - row);
            if (tiled) {
                if (shaped != height) shape_tiles(shaped = height);
                for (int i = 0; i < count; ++i)
                    multiply_split(height, (const uint16_t*)weights + i * panel_stride, linear.stored_inputs,
                                   b.split + 2 * row * b.split_stride, b.split_stride, sums[0] + i * PANEL, 2 * PANEL);
#if defined(HAS_PAIRS)
            } else if (std::is_same_v<T, uint16_t> && model.layout == PAIRS) {
                multiply(height, count, (const uint16_t*)weights, panel_stride, linear.stored_inputs,
                         b.split + row * b.split_stride, b.split_stride, sums[0], 2 * PANEL, ahead);
#endif
            } else {
                multiply(height, count, weights, panel_stride, linear.inputs, x + row * x_stride, x_stride, sums[0],
                         2 * PANEL, ahead);
            }
            for (int r = 0; r < height; ++r) {
                float* to = out + (row + r) * out_stride;
                for (int output = first; output < last; output += LANES) {
                    Floats value = read<Floats>(sums[r] + output - first);
                    if (linear.scale) value *= read<Floats>(linear.scale + output);
                    if (linear.bias) value += read<Floats>(linear.bias + output);
                    if (add) value += read<Floats>(to + output);
                    std::memcpy(to + output, &value, sizeof value);
                }
            }
        }
    });
}

template <class C>
void attend(Crew& crew, const Model& model, int layer, const Batch& batch, const Buffers& b) {
    const int group = model.heads / model.kv_heads, dim = model.head_dim, dim_padded = (int)round_up(dim);
    const long key_size = (long)round_up(model.context) * dim, value_size = (long)model.context * dim_padded;
    const int *slots = batch.slots;
    C* const all_keys = (C*)model.keys + (long)layer * model.slots * model.kv_heads * key_size;
    C* const all_values = (C*)model.values + (long)layer * model.slots * model.kv_heads * value_size;
    const auto keys_of = [&](int row, int head) {
        return all_keys + ((long)slots[row] * model.kv_heads + head) * key_size;
    };
    const auto values_of = [&](int row, int head) {
        return all_values + ((long)slots[row] * model.kv_heads + head) * value_size;
    };

    // Turn a row's queries and its key by their position, and put key and value into the row's slot.
    const auto store = [&](int row, int head) {
        const int position = batch.positions[row];
        float* const queries = b.qkv + row * b.qkv_stride + head * group * dim;
        float* const key = b.qkv + row * b.qkv_stride + (model.heads + head) * dim;
        const float* value = key + model.kv_heads * dim;
        C* const keys = keys_of(row, head) + (long)(position / PANEL) * dim * PANEL + position % PANEL;
        C* const values = values_of(row, head) + (long)position * dim_padded;
        if (model.modern) {
            const float *cosines = model.cosines + (long)position * dim, *sines = model.sines + (long)position * dim;
            const auto place = [&](float* x, const Norm& norm) {
                if (norm.weight) normalise(x, dim, norm.weight, nullptr, model.epsilon, x);
                rotate(x, dim, cosines, sines);
            };
            for (int h = 0; h < group; ++h) place(queries + h * dim, model.layers[layer].query_norm);
            place(key, model.layers[layer].key_norm);
        }
        for (int d = 0; d < dim; d += LANES) {
            C parts[2][LANES];
            write_cache(parts[0], read<Floats>(key + d));
            write_cache(parts[1], read<Floats>(value + d));
            const int count = std::min(LANES, dim - d);
            for (int lane = 0; lane < count; ++lane) keys[(d + lane) * PANEL] = parts[0][lane];
            std::memcpy(values + d, parts[1], count * sizeof(C));
        }
    };
    // Whether a row is the only one of its slot: nobody else looks at what it stores.
    const auto is_alone = [&](int row) {
        return (row == 0 || slots[row - 1] != slots[row]) && (row + 1 == batch.rows || slots[row + 1] != slots[row]);
    };

    // Keys and values of a slot's rows go into it before any of them looks at them. The rows of a prompt write beside
    // each other, so one thread takes several: two would take the same lines of memory from one another.
    const int blocks = b.has_prompts ? (batch.rows + BLOCK_ROWS - 1) / BLOCK_ROWS : 0;
    crew.share(blocks * model.kv_heads, [&](int item, int) {
        const int head = item % model.kv_heads, begin = item / model.kv_heads * BLOCK_ROWS;
        for (int row = begin; row < std::min(begin + BLOCK_ROWS, batch.rows); ++row)
            if (!is_alone(row)) store(row, head);
    });

    const float scale = 1 / std::sqrt((float)dim);
    crew.share(batch.rows * model.kv_heads, [&](int item, int thread) {
        float* const scores = b.scores + thread * b.scores_size;
        float* const mixed = scores + group * b.scores_stride;
        const int row = item / model.kv_heads, head = item % model.kv_heads;
        const int length = batch.positions[row] + 1;
        if (is_alone(row)) store(row, head);
        const float* queries = b.qkv + row * b.qkv_stride + head * group * dim;
        const C *keys = keys_of(row, head), *values = values_of(row, head);
        const int next = std::min(item + crew.threads(), batch.rows * model.kv_heads - 1);  // this thread's, likely
        const long keys_ahead = keys_of(next / model.kv_heads, next % model.kv_heads) - keys;
        const long values_ahead = values_of(next / model.kv_heads, next % model.kv_heads) - values;
        multiply(group, (length + PANEL - 1) / PANEL, keys, (long)dim * PANEL, dim, queries, dim, scores,
                 b.scores_stride, keys_ahead);
        for (int h = 0; h < group; ++h) softmax(scores + h * b.scores_stride, length, scale);
        multiply(group, dim_padded / PANEL, values, PANEL, length, scores, b.scores_stride, mixed, dim_padded,
                 values_ahead, dim_padded);
        for (int h = 0; h < group; ++h) {
            const int at = (head * group + h) * dim;
            if (b.rounds) {
                const bool is_last = head * group + h == model.heads - 1;
                round_row(mixed + h * dim_padded, dim, is_last ? (int)b.mixed_stride - at : dim,
                          b.split + row * b.split_stride + at);
            } else {
                std::memcpy(b.mixed + row * b.mixed_stride + at, mixed + h * dim_padded, dim * sizeof(float));
            }
        }
    });
}

static void activate(Crew& crew, const Model& model, int rows, const Buffers& b) {
    // In whole vectors: one past the end of the gates overwrites only what has been read before.
    crew.share(rows, [&](int row, int) {
        float* gate = b.hidden + row * b.hidden_stride;
        for (int i = 0; i < model.mlp_width; i += LANES) {
            const Floats x = read<Floats>(gate + i);
            Floats out;
            if (model.modern) {
                out = x / (1.0f + exponential(-x)) * read<Floats>(gate + model.mlp_width + i);  // SwiGLU
            } else {
                const Floats inner = 1.5957691216f * (x + 0.044715f * x * x * x);  // GELU by tanh, as a logistic
                out = x / (1.0f + exponential(-inner));
            }
            std::memcpy(gate + i, &out, sizeof out);
        }
        if (b.rounds)
            round_row(gate, model.mlp_width, round_up(model.mlp_width), b.split + row * b.split_stride);
    });
}

// Norm row `from` of x, to row `to` of what the next product reads.
static void normalise_row(const Model& model, const Norm& norm, int from, int to, const Buffers& b) {
    float* const normed = b.normed + to * b.width_stride;
    normalise(b.x + from * b.width_stride, model.width, norm.weight, norm.bias, model.epsilon, normed);
    if (b.rounds) round_row(normed, model.width, b.width_stride, b.split + to * b.split_stride);
}

static void normalise_rows(Crew& crew, const Model& model, const Norm& norm, int rows, const Buffers& b) {
    crew.share(rows, [&](int row, int) { normalise_row(model, norm, row, row, b); });
}

// The first place of the largest of `n` logits; -1 where one is not a number, or the largest is not finite.
static int32_t find_best(const float* logits, int n) {
    constexpr int BLOCK = 16 * LANES;
    float highest = -INFINITY;
    int begin_of_best = 0;
    Ints poison = {};
    for (int begin = 0; begin < n; begin += BLOCK) {
        const int end = std::min(begin + BLOCK, n);
        Floats high = Floats{} - INFINITY;
        int i = begin;
        for (; i + LANES <= end; i += LANES) {
            const Floats part = read<Floats>(logits + i);
            high = part > high ? part : high;
            poison |= part != part;
        }
        float highest_here = *std::max_element((float*)&high, (float*)&high + LANES);
        for (; i < end; ++i) {
            if (std::isnan(logits[i])) return -1;
            highest_here = std::max(highest_here, logits[i]);
        }
        if (highest_here > highest) highest = highest_here, begin_of_best = begin;
    }
    for (int lane = 0; lane < LANES; ++lane)
        if (poison[lane]) return -1;
    if (!std::isfinite(highest)) return -1;
    return std::find(logits + begin_of_best, logits + n, highest) - logits;
}

// W: type of the weights, C: of the cache and the embeddings.
template <class W, class C> void run(Crew& crew, const Model& model, const Batch& batch) {
    Buffers b;
    lay_out(model, batch.rows, batch.threads, batch.workspace, &b);
    const int rows = batch.rows, width = model.width;
    b.has_prompts = std::adjacent_find(batch.slots, batch.slots + rows) != batch.slots + rows;
    crew.share(rows, [&](int row, int) {
        for (int i = 0; i < width; ++i) {
            float value = load((const C*)model.embedding + (long)batch.tokens[row] * width + i);
            if (!model.modern)
                value += load((const C*)model.position_embedding + (long)batch.positions[row] * width + i);
            b.x[row * b.width_stride + i] = value;
        }
    });
    for (int number = 0; number < model.num_layers; ++number) {
        const Layer& layer = model.layers[number];
        normalise_rows(crew, model, layer.attention_norm, rows, b);
        apply<W>(crew, model, b, layer.qkv, rows, b.normed, b.width_stride, b.qkv, b.qkv_stride, false);
        attend<C>(crew, model, number, batch, b);
        apply<W>(crew, model, b, layer.attention_output, rows, b.mixed, b.mixed_stride, b.x, b.width_stride, true);
        normalise_rows(crew, model, layer.mlp_norm, rows, b);
        apply<W>(crew, model, b, layer.up, rows, b.normed, b.width_stride, b.hidden, b.hidden_stride, false);
        activate(crew, model, rows, b);
        apply<W>(crew, model, b, layer.mlp_output, rows, b.hidden, b.hidden_stride, b.x, b.width_stride, true);
    }
    crew.share(batch.num_logits, [&](int i, int) { normalise_row(model, model.norm, batch.logit_rows[i], i, b); });
    apply<W>(crew, model, b, model.head, batch.num_logits, b.normed, b.width_stride, batch.logits, model.head.outputs,
             false);
    crew.share(batch.num_logits, [&](int i, int) {
        batch.best[i] = find_best(batch.logits + (long)i * model.head.outputs, batch.vocabulary);
    });
}

// One crew per process and one pass at a time: more would only share the same cores. It is never freed, because its
// threads wait in it until the process ends.
static std::mutex turn;
static Crew& shared_crew() {
    static Crew* const crew = new Crew();
    return *crew;
}

extern "C" int32_t forward(const Model* model, const Batch* batch) {
    const std::lock_guard<std::mutex> lock(turn);
    Crew& crew = shared_crew();
    crew.wake(batch->threads);
    const auto pass = [&](auto weight) {
        using W = decltype(weight);
        if (model->cache_type == FLOAT32)
            run<W, float>(crew, *model, *batch);
        else
            run<W, uint16_t>(crew, *model, *batch);
    };
    switch (model->weight_type) {
        case FLOAT32: pass(float()); break;
        case BFLOAT16: pass(uint16_t()); break;
        case INT8: pass(int8_t()); break;
    }
    crew.rest();
    return 0;
}

// -- Logits that come from elsewhere ----------------------------------------------------------------------------------

// The logarithm of the sum of a row's exponentials, NaN if one of its `n` logits is not finite, and the first place of
// its largest. The row comes from memory once: the second reading finds it in the cache.
template <class T> void summarise(const T* logits, int n, float* log_sum, int32_t* best) {
    constexpr int BLOCK = 16 * PANEL;
    float highest = -INFINITY;
    int begin_of_best = 0;
    for (int begin = 0; begin < n; begin += BLOCK) {
        const int end = std::min(begin + BLOCK, n);
        Floats first, second, high = Floats{} - INFINITY;
        int i = begin;
        for (; i + PANEL <= end; i += PANEL) {
            read_panel(logits + i, first, second);
            high = first > high ? first : high;
            high = second > high ? second : high;
        }
        float highest_here = -INFINITY;
        for (int lane = 0; lane < LANES; ++lane) highest_here = std::max(highest_here, high[lane]);
        for (; i < end; ++i) highest_here = std::max(highest_here, load(logits + i));
        if (highest_here > highest) highest = highest_here, begin_of_best = begin;
    }
    Floats first, second, total = {}, poison = {};
    float rest = 0;
    int i = 0;
    for (; i + PANEL <= n; i += PANEL) {
        read_panel(logits + i, first, second);
        total += exponential(first - highest) + exponential(second - highest);
        poison += (first - first) + (second - second);
    }
    for (; i < n; ++i) rest += std::exp(load(logits + i) - highest);
    *log_sum = highest + std::log(sum(total) + rest) + sum(poison);
    for (*best = begin_of_best; *best < n - 1 && load(logits + *best) != highest;) ++*best;
}

// For each of `rows` rows of logits, `stride` apart, in float32 or bfloat16.
extern "C" void summarise_logits(const void* logits, int32_t type, int64_t rows, int64_t stride, int32_t vocabulary,
                                 int32_t threads, float* log_sums, int32_t* best) {
    const std::lock_guard<std::mutex> lock(turn);
    Crew& crew = shared_crew();
    crew.wake(threads);
    crew.share((int)rows, [&](int row, int) {
        if (type == FLOAT32)
            summarise((const float*)logits + row * stride, vocabulary, log_sums + row, best + row);
        else
            summarise((const uint16_t*)logits + row * stride, vocabulary, log_sums + row, best + row);
    });
    crew.rest();
}
