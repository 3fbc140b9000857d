// The orthogonal factors of small matrices, further down, and the two passes over the weights of a training step on a CPU, for every rule
// whose learned hyperparameter (lr, or none) does not enter its direction. What happens between the passes, every level above and trust, is
// a matter of a few numbers and left to the caller.
//
//     look    what must be known before the step: whether g is finite, Σg·(tangent), on request ‖place‖ and ‖s‖, of what lr moves and the
//             step s at lr = 1, where an average forgets, Σg·gap, and where state is kept relative to x, Σx
//     take    state, place −= lr·s, what follows from place (averages, x), the tangents of all of it, and Σx
//
// The direction is either given in D, by any rule, or Adam's, which is computed here, once in each pass: reading it back would cost as much
// as reading m, v and g again does. Both corrections of Adam's bias are moved to the scalars.
//
// With weights that do not stay in the cache, the time of a step is that of reading them. With 10 million weights and lr learned, both passes
// together read nine arrays for Adam and as many for ScheduleFree(Adam), torch's fused Adam reads four, and the step takes 2.2 and 2.3 times
// as long on one thread of an EPYC 7003. One loop over all arrays of a pass is then 10 % faster than two. With weights that stay in the cache,
// the time is that of the root and the division, and one loop that keeps an average besides takes 30 % longer than two, as fewer of its
// elements are in flight at a time. Hence `take` is one loop for the rules without an average, and two for the others, the first of which
// fetches what the second reads.
//
// gcc 12 vectorises none of these loops for AVX2 if there is a branch in it, even one on a loop-invariant. Hence all cases are templates,
// chosen once for each block, and inside a loop there are only choices between values that exist on both sides (z or 0).

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Columns of `tensors` and indices of `values`; functions.py has the same names in the same order.
enum Column { X, G, D, M, V, GAP, AVERAGE, ZX, ZA, T, WEIGHT, ZWEIGHT, MIX, LAG, LAG_SIZE, DECAY };
enum Value { REST1, REST2, EPS, BETA, REST_DECAY, FORGET, THROUGH, CAUTIOUS, LARGEST };

constexpr int SUMS = 6;               // that `look` makes
constexpr float MEMORY = 0.98f;       // of the mean that says whether an average lags behind, as in schedule_free.py
constexpr int64_t SUM = 2048;         // elements that are added up in float
constexpr int64_t PIECE = 512;        // elements whose steps lie between two loops, in the first-level cache
constexpr int64_t FETCH = 64;         // elements that are fetched at a time; with 256 all wait for memory before any is computed
constexpr int64_t SERIAL = 1 << 15;   // elements in all below which one thread does everything, in 20 to 40 microseconds
constexpr int64_t FAR = 1 << 20;      // elements in all from which on fetching helps, by 10 %; where they stay in the cache it costs 5 %

// What the caller hands to both passes.
struct Table {
    const int64_t* block;
    int64_t count;
    void* const* tensors;
    const float* const* values;

    float* column(Column c, int64_t tensor) const { return static_cast<float*>(tensors[c * count + tensor]); }
    float number(Column c, int64_t tensor) const {
        const float* p = column(c, tensor);
        return p ? *p : 0;
    }
    float value(Value v) const { return values[v] ? *values[v] : 0; }
};

// One row of `block`: a stretch of one tensor. What a rule does not have is null.
struct Stretch {
    int64_t tensor, n;
    float *x, *g, *d, *m, *v, *gap, *average, *zx, *za;

    Stretch(const Table& table, int64_t b) : tensor(table.block[3 * b]), n(table.block[3 * b + 2]) {
        auto at = [&](Column c) {
            float* p = table.column(c, tensor);
            return p ? p + table.block[3 * b + 1] : nullptr;
        };
        x = at(X), g = at(G), d = at(D), m = at(M), v = at(V), gap = at(GAP), average = at(AVERAGE), zx = at(ZX), za = at(ZA);
    }
};

// a + w·(b − a) for w below a half, b − (1 − w)·(b − a) from there on, as torch.lerp: at w = 1 it is b exactly.
struct Lerp {
    int32_t late;  // all bits or none: on a bool gcc makes two loops, of which it vectorises one or neither
    float weight;

    explicit Lerp(float w) : late(w >= 0.5f ? -1 : 0), weight(w >= 0.5f ? w - 1 : w) {}
    float operator()(float a, float b) const {
        int32_t from, to;
        std::memcpy(&from, &a, 4), std::memcpy(&to, &b, 4);
        from ^= (from ^ to) & late;
        float base;
        std::memcpy(&base, &from, 4);
        return base + weight * (b - a);
    }
};

inline float finite_or_zero(float z) { return std::fabs(z) <= FLT_MAX ? z : 0; }

// 1 − beta^t for 1 − beta, without cancellation.
inline float rest_of_power(float rest, float t) { return -std::expm1(t * std::log1p(-rest)); }

// Adam's scalars at a step; `t` counts from 1.
struct Adam {
    Lerp first, second;
    float eps, size, t;

    Adam(const Table& table, bool momentum, float step) : first(table.value(REST1)), second(table.value(REST2)), t(step) {
        size = std::sqrt(rest_of_power(table.value(REST2), t));
        eps = table.value(EPS) * size;
        if (momentum) size /= rest_of_power(table.value(REST1), t);
    }
    float moment1(float m, float g) const { return first(m, g); }
    float moment2(float v, float g) const { return second(v, std::min(g * g, FLT_MAX)); }
    // The bound is on the root, not on v: gcc turns the root of a constant into a branch.
    float direction(float m, float v) const { return size * m / (std::max(std::sqrt(v), 0x1p-63f) + eps); }
};

// Those of the stretch before this one, as long as they are the same: tensors of a few elements are many.
struct Scalars {
    const Table& table;
    Adam adam;
    bool momentum = false;

    explicit Scalars(const Table& all) : table(all), adam(all, false, NAN) {}
    const Adam& of(const Stretch& at) {
        float t = table.number(T, at.tensor) + 1;
        if (t != adam.t || momentum != (at.m != nullptr)) adam = Adam(table, momentum = at.m != nullptr, t);
        return adam;
    }
};

// Decoupled weight decay: of every element, or of those whose size the step does not increase. A step with decay has the sign of that
// without.
struct Decay {
    float rate, above, most;

    Decay(const Table& table, int64_t tensor)
        : rate(table.number(DECAY, tensor)), above(table.value(CAUTIOUS) > 0 ? 0 : -INFINITY), most(table.value(LARGEST)) {}
    // A product or a comparison on one side alone would be a branch, and so would std::min of a member: the passes take six times as long.
    float of(float step, float x) const {
        const float below = x < most ? x : most, decayed = rate * (below > -most ? below : -most);
        return step * x >= above ? decayed : 0;
    }
    float slope(float step, float x) const {
        const float within = std::fabs(x) <= most ? rate : 0;
        return step * x >= above ? within : 0;
    }
};

// What the averages and tangents of a tensor count at a step.
struct Mix {
    float lr, beta, keep;           // keep: what tangents count in those that follow
    Decay decay;
    float mix = 0;                  // ScheduleFree's beta1 of the step before: z = x + mix·gap
    float weight = 0, zweight = 0;  // its w' and the tangent of that
    float lag = 0, lag_size = 0;    // its means of <g, gap> and of the size of that
    float share = 0, zshare = 0;    // c in a' = a + c·(place' − a), and its tangent

    Mix(const Table& table, int64_t tensor, float step, float kept, float behind)
        : lr(step), beta(table.value(BETA)), keep(kept), decay(table, tensor) {
        if (table.column(GAP, tensor)) {
            float square = lr * lr;
            mix = table.number(MIX, tensor);
            float past = 1;
            if (table.column(LAG, tensor)) {
                lag = MEMORY * table.number(LAG, tensor) + (1 - MEMORY) * behind;
                lag_size = MEMORY * table.number(LAG_SIZE, tensor) + (1 - MEMORY) * std::fabs(behind);
                past -= table.value(FORGET) * std::max(-lag / std::max(lag_size, FLT_MIN), 0.0f);
            }
            weight = past * table.number(WEIGHT, tensor) + square;
            share = square / std::max(weight, FLT_MIN);
            if (table.column(ZWEIGHT, tensor)) {  // where the average forgets, c is a constant in the derivatives
                zweight = keep * past * finite_or_zero(table.number(ZWEIGHT, tensor)) + 2 * square;
                zshare = share * (2 - (weight >= FLT_MIN ? zweight / weight : 0));
            }
        } else if (float rest = table.value(REST_DECAY)) {
            share = rest / rest_of_power(rest, table.number(T, tensor) + 1);
        }
    }
};

enum Direction { GIVEN, GRADIENT, MOMENTUM };  // read from D; Adam's without and with a first moment
enum Tangents { NONE, OF_X, OF_BOTH };         // none, that of x, that of the gap or the average too
enum Through { NOTHING, ONE, BOTH };           // the tangents that hypergradients are taken through

// Calls f with a constant in place of the number, so that loops can be made for it.
template <int... OPTIONS, class F> void choose(int option, F f) {
    (void)((option == OPTIONS && (f(std::integral_constant<int, OPTIONS>{}), true)) || ...);
}

// The step at lr = 1 of element j; Adam's moments are put into m1 and v1.
template <int KIND, bool DECAYED> inline float step(const Stretch& at, const Adam& adam, Decay decay, int64_t j, float& m1, float& v1) {
    float s;
    if constexpr (KIND == GIVEN) s = at.d[j];
    else {
        m1 = at.g[j], v1 = adam.moment2(at.v[j], m1);
        if constexpr (KIND == MOMENTUM) m1 = adam.moment1(at.m[j], m1);
        s = adam.direction(m1, v1);
    }
    if constexpr (DECAYED) {
        const float x = finite_or_zero(at.x[j]);
        s += decay.of(s, x);
    }
    return s;
}

// The loops take their arguments by value: what is only referred to might change with every element that is written.

// The tangent that a hypergradient is taken through: that of x and, under ScheduleFree, so much of that of the gap.
struct Pull {
    const float *first, *second;
    float weight;

    Pull(const Stretch& at, float mix, float through) : first(at.zx), second(at.gap ? at.za : nullptr), weight(mix - through) {}
    template <int THROUGH> float of(int64_t j) const {
        if constexpr (THROUGH == BOTH) return first[j] + weight * second[j];
        else return first[j];
    }
};

// Adds Σg², Σg·z, of the step Σs², and Σg·gap to `sums`.
template <int KIND, bool DECAYED, int THROUGH, bool LAGS>
void measured(Stretch at, Pull z, Adam adam, Decay decay, int64_t from, int64_t to, double* sums) {
    float gradient = 0, inner = 0, moves = 0, lag = 0;
#pragma omp simd reduction(+ : gradient, inner, moves, lag)
    for (int64_t j = from; j < to; j++) {
        float m1, v1;
        const float s = step<KIND, DECAYED>(at, adam, decay, j, m1, v1);
        if constexpr (THROUGH != NOTHING) inner += at.g[j] * z.of<THROUGH>(j);
        if constexpr (LAGS) lag += at.g[j] * at.gap[j];
        gradient += at.g[j] * at.g[j], moves += s * s;
    }
    sums[0] += gradient, sums[1] += inner, sums[3] += moves, sums[4] += lag;
}

// The same without Σs².
template <int THROUGH, bool LAGS> void unmeasured(Stretch at, Pull z, Adam, Decay, int64_t from, int64_t to, double* sums) {
    float gradient = 0, inner = 0, lag = 0;
#pragma omp simd reduction(+ : gradient, inner, lag)
    for (int64_t j = from; j < to; j++) {
        gradient += at.g[j] * at.g[j];
        if constexpr (THROUGH != NOTHING) inner += at.g[j] * z.of<THROUGH>(j);
        if constexpr (LAGS) lag += at.g[j] * at.gap[j];
    }
    sums[0] += gradient, sums[1] += inner, sums[4] += lag;
}

// Σplace².
template <bool FREE> float squares(Stretch at, float mix, int64_t from, int64_t to) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = from; j < to; j++) {
        float place = at.x[j];
        if constexpr (FREE) place += mix * at.gap[j];
        sum += place * place;
    }
    return sum;
}

// Σx: the same bits in both passes.
__attribute__((noinline)) float added(const float* x, int64_t from, int64_t to) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = from; j < to; j++) sum += x[j];
    return sum;
}

// In all that follows, reads come first and writes last: gcc takes it that a write may change what is read after it.

template <int KIND> inline void write_moments(const Stretch& at, int64_t j, float m1, float v1) {
    if constexpr (KIND != GIVEN) at.v[j] = v1;
    if constexpr (KIND == MOMENTUM) at.m[j] = m1;
}

// The whole step of a rule without an average.
template <int KIND, bool DECAYED, bool TANGENT> void advance(Stretch at, Adam adam, Mix by, int64_t from, int64_t to) {
#pragma omp simd
    for (int64_t j = from; j < to; j++) {
        float m1, v1, z1;
        const float x = at.x[j], s = step<KIND, DECAYED>(at, adam, by.decay, j, m1, v1), move = by.lr * s, x1 = x - move;
        if constexpr (TANGENT) {
            const float z = by.keep * finite_or_zero(at.zx[j]);
            z1 = z - move;
            if constexpr (DECAYED) z1 -= by.lr * by.decay.slope(s, x) * z;
        }
        write_moments<KIND>(at, j, m1, v1);
        if constexpr (TANGENT) at.zx[j] = z1;
        at.x[j] = x1;
    }
}

// For a rule with an average, the step at lr = 1 into `steps`, and the moments.
template <int KIND, bool DECAYED> void prepare(Stretch at, Adam adam, Decay decay, int64_t from, int64_t to, float* steps) {
#pragma omp simd
    for (int64_t j = from; j < to; j++) {
        float m1, v1;
        steps[j - from] = step<KIND, DECAYED>(at, adam, decay, j, m1, v1);
        write_moments<KIND>(at, j, m1, v1);
    }
}

// What follows from that. The small changes of x are added up before x, so that nothing changes at lr = 0 and beta1 = 1.
template <bool FREE, int TANGENTS> void follow(Stretch at, Mix by, int64_t from, int64_t to, const float* steps) {
    const float left = 1 - by.share;
#pragma omp simd
    for (int64_t j = from; j < to; j++) {
        const float s = steps[j - from], x = at.x[j], move = by.lr * s, decayed = by.lr * by.decay.slope(s, x);
        float z1, za1;
        if constexpr (FREE) {
            const float gap = at.gap[j], moved = gap - move, gap1 = left * moved;
            if constexpr (TANGENTS != NONE) {
                const float z = by.keep * finite_or_zero(at.zx[j]), zgap = by.keep * finite_or_zero(at.za[j]), zmove = decayed * z + move;
                za1 = left * (zgap - zmove) - by.zshare * moved;
                z1 = z + (by.mix * zgap - zmove - by.beta * za1);
                at.zx[j] = z1, at.za[j] = za1;
            }
            at.gap[j] = gap1;
            at.x[j] = x + (by.mix * gap - move - by.beta * gap1);
        } else {
            const float old = at.average[j], x1 = x - move;
            if constexpr (TANGENTS != NONE) {
                const float z = by.keep * finite_or_zero(at.zx[j]);
                z1 = z - decayed * z - move;
                if constexpr (TANGENTS == OF_BOTH) za1 = by.keep * left * finite_or_zero(at.za[j]) + by.share * z1;
                at.zx[j] = z1;
                if constexpr (TANGENTS == OF_BOTH) at.za[j] = za1;
            }
            at.average[j] = old + by.share * (x1 - old);
            at.x[j] = x1;
        }
    }
}

// Fetches what the second of these loops reads while the first computes.
struct Ahead {
    const float* arrays[5];
    int count = 0;

    explicit Ahead(const Stretch& at) {
        for (const float* p : {at.x, at.gap, at.average, at.zx, at.za})
            if (p) arrays[count++] = p;
    }
    void operator()(int64_t from, int64_t to) const {
        for (int k = 0; k < count; k++)
            for (int64_t j = from; j < to; j += 16) __builtin_prefetch(arrays[k] + j, 1);
    }
};

// Which of these loops a stretch needs.

template <class F> void choose_step(const Stretch& at, bool decay, F f) {
    choose<GIVEN, GRADIENT, MOMENTUM>(at.d ? GIVEN : at.m ? MOMENTUM : GRADIENT, [&](auto kind) {
        choose<false, true>(decay, [&](auto decayed) { f(kind, decayed); });
    });
}

auto measured_of(const Stretch& at, const Pull& z, bool measure, bool decay, bool lags) {
    auto found = unmeasured<NOTHING, false>;
    choose<NOTHING, ONE, BOTH>(z.second ? BOTH : z.first ? ONE : NOTHING, [&](auto through) {
        choose<false, true>(lags, [&](auto lag) {
            found = unmeasured<through, lag>;
            if (measure) choose_step(at, decay, [&](auto kind, auto decayed) { found = measured<kind, decayed, through, lag>; });
        });
    });
    return found;
}

auto advance_of(const Stretch& at, bool decay) {
    auto found = advance<GIVEN, false, false>;
    choose<false, true>(at.zx != nullptr, [&](auto tangent) {
        choose_step(at, decay, [&](auto kind, auto decayed) { found = advance<kind, decayed, tangent>; });
    });
    return found;
}

auto prepare_of(const Stretch& at, bool decay) {
    auto found = prepare<GIVEN, false>;
    choose_step(at, decay, [&](auto kind, auto decayed) { found = prepare<kind, decayed>; });
    return found;
}

auto follow_of(const Stretch& at) {
    auto found = follow<false, NONE>;
    choose<false, true>(at.gap != nullptr, [&](auto free) {
        choose<NONE, OF_X, OF_BOTH>(!at.zx ? NONE : at.za ? OF_BOTH : OF_X, [&](auto tangents) { found = follow<free, tangents>; });
    });
    return found;
}

int64_t elements(int64_t blocks, const int64_t* block) {
    int64_t all = 0;
    for (int64_t b = 0; b < blocks; b++) all += block[3 * b + 2];
    return all;
}

// Calls work(begin, end) with a range of blocks for each thread, all of them with the same number of elements and not of blocks: of the 16 of
// an MLP for MNIST four are small. The team is never smaller than it was asked to be, as libgomp ends the threads that are left over and
// torch would have to start them again.
template <class Work> void for_blocks(int64_t threads, int64_t blocks, const int64_t* block, const Work& work) {
    const int64_t all = elements(blocks, block);
#ifdef _OPENMP
    if (threads > 1 && all >= SERIAL) {
#pragma omp parallel num_threads(static_cast<int>(threads))
        {
            // A block belongs to the thread in whose share its middle lies.
            const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
            int64_t begin = 0, end = 0, before = 0;
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t owner = (before + block[3 * b + 2] / 2) * team / all;
                begin += owner < me, end += owner <= me, before += block[3 * b + 2];
            }
            work(begin, end);
        }
        return;
    }
#endif
    work(0, blocks);
}

// Block after block, so that the sums do not depend on the number of threads.
float total(int64_t blocks, const double* partial, int k) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; b++) sum += partial[SUMS * b + k];
    return static_cast<float>(sum);
}

// Whether all gradients are finite, for when Σg² is not.
bool finite(const Table& table, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++) {
        const Stretch at(table, b);
        for (int64_t j = 0; j < at.n; j++)
            if (!(std::fabs(at.g[j]) <= FLT_MAX)) return false;
    }
    return true;
}

// ---- U·Vᵀ of small matrices
//
// A library's product of two 64 x 64 matrices waits longer for its threads, and is longer on its way through Python, than it takes. Here a
// thread does all of the work on a matrix, whose products stay in its second-level cache.

// As many floats as are multiplied and added at once.
#if defined(__GNUC__) && defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__GNUC__) && defined(__AVX__)
constexpr int LANES = 8;
#elif defined(__GNUC__)
constexpr int LANES = 4;
#else
constexpr int LANES = 1;
#endif
#ifdef __GNUC__
typedef float Vector __attribute__((vector_size(4 * LANES)));
#else
typedef float Vector;
#endif

constexpr int ROWS = 6;                       // of a product that are computed together,
constexpr int COLUMNS = LANES == 16 ? 4 : 2;  // with this many vectors of each: they stay in registers
constexpr int OTHERS = LANES == 16 ? 3 : 2;   // rows that ROWS rows are multiplied with at a time, where both lie along the sum
constexpr int WIDE = COLUMNS * LANES;

inline Vector load(const float* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// A matrix that is kept with rows and columns of zeros, up to whole tiles.
struct Matrix {
    int64_t rows, columns, stride;
    std::vector<float> at;

    Matrix(int64_t r, int64_t c)
        : rows((r + ROWS - 1) / ROWS * ROWS), columns(c), stride((c + LANES - 1) / LANES * LANES), at(rows * stride) {}
    float* row(int64_t i) { return at.data() + i * stride; }
    const float* row(int64_t i) const { return at.data() + i * stride; }
};

// `wide` vectors of ROWS rows of a·A·B + b·C, to the columns of `out` from `to` on.
template <int wide>
void tile(int64_t i, int64_t j, float a, const Matrix& A, const Matrix& B, float b, const Matrix& C, Matrix& out, int64_t to) {
    Vector sums[ROWS][wide] = {};
    const float* left = A.row(i);
    for (int64_t k = 0; k < A.columns; k++) {
        Vector right[wide];
        for (int v = 0; v < wide; v++) right[v] = load(B.row(k) + j + v * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < wide; v++) sums[r][v] = sums[r][v] + left[r * A.stride + k] * right[v];
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < wide; v++) {
            Vector found = a * sums[r][v];
            if (b != 0) found = found + b * load(C.row(i + r) + j + v * LANES);
            std::memcpy(out.row(i + r) + to + v * LANES, &found, sizeof found);
        }
}

// out = a·A·B + b·C, which is known to be symmetric; `out` is none of the others.
void multiply(float a, const Matrix& A, const Matrix& B, float b, const Matrix& C, Matrix& out) {
    for (int64_t i = 0; i < A.rows; i += ROWS)
        for (int64_t j = i / LANES * LANES; j < B.stride; j += WIDE)
            choose<1, 2, 3, COLUMNS>(static_cast<int>(std::min<int64_t>(B.stride - j, WIDE)) / LANES,
                                     [&](auto wide) { tile<wide>(i, j, a, A, B, b, C, out, j); });
    for (int64_t i = 0; i < out.columns; i++)
        for (int64_t j = 0; j < i; j++) out.row(i)[j] = out.row(j)[i];
}

// out = x·xᵀ.
void square(const Matrix& x, Matrix& out) {
    for (int64_t i = 0; i < x.rows; i += ROWS)
        for (int64_t j = i; j < x.rows; j += OTHERS) {
            Vector sums[ROWS][OTHERS] = {};
            for (int64_t k = 0; k < x.stride; k += LANES) {
                Vector right[OTHERS];
                for (int o = 0; o < OTHERS; o++) right[o] = load(x.row(j + o) + k);
                for (int r = 0; r < ROWS; r++)
                    for (int o = 0; o < OTHERS; o++) sums[r][o] = sums[r][o] + load(x.row(i + r) + k) * right[o];
            }
            for (int64_t r = i; r < std::min(i + ROWS, out.columns); r++)
                for (int64_t o = j; o < std::min(j + OTHERS, out.columns); o++) {
                    float lanes[LANES], sum = 0;
                    std::memcpy(lanes, &sums[r - i][o - j], sizeof lanes);
                    for (float lane : lanes) sum += lane;
                    out.row(r)[o] = out.row(o)[r] = sum;
                }
        }
}

// A matrix wherever it is, with the elements at[i·down + j·along].
template <class Float> struct View {
    Float* at;
    int64_t down, along;
};

// Copies `rows` x `columns` elements of a matrix, in stretches that are short in both directions where one lies across the other.
template <class From, class To> void copy(int64_t rows, int64_t columns, From from, To to) {
    if (from.along == 1 && to.along == 1) {
        for (int64_t i = 0; i < rows; i++) std::copy_n(from.at + i * from.down, columns, to.at + i * to.down);
        return;
    }
    for (int64_t start = 0; start < columns; start += LANES)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = start; j < std::min(start + LANES, columns); j++)
                to.at[i * to.down + j * to.along] = from.at[i * from.down + j * from.along];
}

// Newton-Schulz as in muon.py.
class Orthogonal {
    Matrix x, part, gram, other, q, product;

public:
    Orthogonal(int64_t r, int64_t c) : x(r, c), part(r, WIDE), gram(r, r), other(r, r), q(r, r), product(r, r) {}

    // scale·U·Vᵀ of `in` to `out`. follow: x·xᵀ is followed and not computed anew.
    void operator()(View<const float> in, View<float> out, int64_t steps, const float* abc, float least, bool follow, float scale) {
        const float a = abc[0], b = abc[1], c = abc[2];
        const int64_t r = gram.columns;
        const View<float> mine{x.row(0), x.stride, 1};
        copy(r, x.columns, in, mine);
        const float norm = std::max(static_cast<float>(std::sqrt(squares())), least);
        each([&](float& element) { element /= norm; });
        for (int64_t step = 0; step < steps; step++) {
            if (!step || !follow) square(x, gram);
            multiply(c, gram, gram, b, gram, q);
            if (!follow) {
                apply(1, q, a, mine);
                continue;
            }
            if (step) {
                multiply(1, product, q, a, product, other);
                std::swap(product, other);
            } else {
                product = q;
                for (int64_t i = 0; i < r; i++) product.row(i)[i] += a;
            }
            if (step < steps - 1) {
                multiply(1, gram, q, a, gram, other);
                multiply(1, other, q, a, other, gram);
            }
        }
        if (follow) return apply(scale, product, 0, out);
        each([&](float& element) { element *= scale; });
        copy(r, x.columns, mine, out);
    }

private:
    // Calls f for the elements of x. Not for what is beyond its columns, which must stay 0 whatever f is: the next matrix finds it there.
    template <class F> void each(F f) {
        for (int64_t i = 0; i < gram.columns; i++)
            for (int64_t j = 0; j < x.columns; j++) f(x.row(i)[j]);
    }

    double squares() const {
        double sum = 0;
        for (size_t from = 0; from < x.at.size(); from += x.stride) {
            float sums[LANES] = {};
            for (int64_t j = 0; j < x.stride; j += LANES)
                for (int l = 0; l < LANES; l++) sums[l] += x.at[from + j + l] * x.at[from + j + l];
            for (float lane : sums) sum += lane;
        }
        return sum;
    }

    // a·A·x + b·x to `out`, which may be x.
    void apply(float a, const Matrix& A, float b, View<float> out) {
        for (int64_t j = 0; j < x.columns; j += WIDE) {
            const int64_t wide = std::min<int64_t>(x.stride - j, WIDE);
            for (int64_t i = 0; i < x.rows; i += ROWS)
                choose<1, 2, 3, COLUMNS>(static_cast<int>(wide) / LANES, [&](auto w) { tile<w>(i, j, a, A, x, b, x, part, 0); });
            copy(A.columns, std::min<int64_t>(x.columns - j, WIDE), View<float>{part.row(0), part.stride, 1},
                 View<float>{out.at + j * out.along, out.down, out.along});
        }
    }
};

}  // namespace

// Whether this CPU has the instructions that the file was compiled for. An object built with -march=native may reach another machine inside
// a copied environment; the check itself uses none of them.
#if defined(__x86_64__) && defined(__GNUC__)
#define BASELINE __attribute__((target("no-avx,no-bmi,no-bmi2")))
#else
#define BASELINE
#endif
extern "C" BASELINE int usable() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
#define NEEDS(name) \
    if (!__builtin_cpu_supports(name)) return 0;
#ifdef __SSE4_2__
    NEEDS("sse4.2")
#endif
#ifdef __POPCNT__
    NEEDS("popcnt")
#endif
#ifdef __AVX__
    NEEDS("avx")
#endif
#ifdef __AVX2__
    NEEDS("avx2")
#endif
#ifdef __FMA__
    NEEDS("fma")
#endif
#ifdef __FMA4__
    NEEDS("fma4")
#endif
#ifdef __BMI__
    NEEDS("bmi")
#endif
#ifdef __BMI2__
    NEEDS("bmi2")
#endif
#ifdef __AVX512F__
    NEEDS("avx512f")
#endif
#ifdef __AVX512VL__
    NEEDS("avx512vl")
#endif
#ifdef __AVX512BW__
    NEEDS("avx512bw")
#endif
#ifdef __AVX512DQ__
    NEEDS("avx512dq")
#endif
#ifdef __AVX512CD__
    NEEDS("avx512cd")
#endif
#ifdef __AVX512ER__
    NEEDS("avx512er")
#endif
#undef NEEDS
#endif
    return 1;
}

// The checksum of the file that this was compiled from, where the build said what it is.
#ifndef SOURCE
#define SOURCE 0
#endif
extern "C" uint32_t source() { return SOURCE; }

// Returns 1 where gradients are finite and a sum of squares of theirs or of the step is not: such a step needs more care than is taken here.
extern "C" int look(int64_t threads, int64_t measure, int64_t blocks, const int64_t* block, int64_t count, void* const* tensors,
                     const float* const* values, double* partial, float* sums) {
    const Table table{block, count, tensors, values};
    const float through = values[THROUGH] ? *values[THROUGH] : 1;
    for_blocks(threads, blocks, block, [&](int64_t begin, int64_t end) {
        Scalars scalars(table);
        for (int64_t b = begin; b < end; b++) {
            const Stretch at(table, b);
            const Adam& adam = scalars.of(at);
            const float mix = at.gap ? table.number(MIX, at.tensor) : 0;
            const Decay decay(table, at.tensor);
            const Pull z(at, mix, through);
            const bool lags = table.column(LAG, at.tensor);
            const auto measured = measured_of(at, z, measure, decay.rate != 0, lags);
            const auto squares_of = at.gap ? squares<true> : squares<false>;
            double* found = partial + SUMS * b;
            std::fill(found, found + SUMS, 0.0);
            for (int64_t i = 0; i < at.n; i += SUM) {
                const int64_t to = std::min(i + SUM, at.n);
                measured(at, z, adam, decay, i, to, found);
                if (measure) found[2] += squares_of(at, mix, i, to);
                if (at.gap) found[5] += added(at.x, i, to);
            }
        }
    });
    const bool small = total(blocks, partial, 0) <= FLT_MAX;
    sums[0] = small || finite(table, blocks);
    sums[1] = total(blocks, partial, 1);
    sums[2] = std::sqrt(total(blocks, partial, 2));
    sums[3] = std::sqrt(total(blocks, partial, 3));
    sums[4] = total(blocks, partial, 4);
    sums[5] = total(blocks, partial, 5);
    return sums[0] > 0 && !(small && sums[3] <= FLT_MAX);
}

extern "C" void take(int64_t threads, int64_t blocks, const int64_t* block, int64_t count, void* const* tensors,
                     const float* const* values, int64_t heads, const int64_t* head, const float* orders, double* partial, float* sums) {
    const float ok = orders[0], lr = orders[1], keep = orders[2], behind = orders[3];
    if (!(ok > 0)) return;
    const Table table{block, count, tensors, values};
    const bool far = elements(blocks, block) > FAR;
    for_blocks(threads, blocks, block, [&](int64_t begin, int64_t end) {
        Scalars scalars(table);
        float steps[PIECE];
        // Backwards, as `look` has left the last blocks in the cache.
        for (int64_t b = end - 1; b >= begin; b--) {
            const Stretch at(table, b);
            const Adam& adam = scalars.of(at);
            const Mix by(table, at.tensor, lr, keep, behind);
            if (!at.gap && !at.average) {
                const auto advance = advance_of(at, by.decay.rate != 0);
                for (int64_t i = 0; i < at.n; i += SUM) advance(at, adam, by, i, std::min(i + SUM, at.n));
                continue;
            }
            const auto prepare = prepare_of(at, by.decay.rate != 0);
            const auto follow = follow_of(at);
            const Ahead ahead(at);
            const int64_t stride = far ? FETCH : PIECE;
            for (int64_t i = 0; i < at.n; i += PIECE) {
                const int64_t to = std::min(i + PIECE, at.n);
                for (int64_t j = i; j < to; j += stride) {
                    if (far) ahead(j, j + stride);
                    prepare(at, adam, by.decay, j, std::min(j + stride, to), steps + j - i);
                }
                follow(at, by, i, to, steps);
            }
            double& sum = partial[SUMS * b + 5] = 0;
            if (at.gap)
                for (int64_t i = 0; i < at.n; i += SUM) sum += added(at.x, i, std::min(i + SUM, at.n));
        }
    });
    // Only now, as every block of a chunk has read them.
    for (int64_t h = 0; h < heads; h++) {
        const int64_t tensor = head[h];
        const Mix by(table, tensor, lr, keep, behind);
        *table.column(T, tensor) += 1;
        if (!table.column(GAP, tensor)) continue;
        *table.column(WEIGHT, tensor) = by.weight;
        if (table.column(ZWEIGHT, tensor)) *table.column(ZWEIGHT, tensor) = by.zweight;
        *table.column(MIX, tensor) = by.beta;
        if (table.column(LAG, tensor)) *table.column(LAG, tensor) = by.lag, *table.column(LAG_SIZE, tensor) = by.lag_size;
    }
    sums[5] = total(blocks, partial, 5);
}

// U·Vᵀ of each of `count` matrices of `rows` x `columns`, one after the other in `in`, `scale` times, to `out`. No norm below `least` is
// divided by.
extern "C" void orthogonal(int64_t threads, int64_t count, int64_t rows, int64_t columns, const float* in, float* out, int64_t steps,
                           const float* coefficients, float least, int64_t follow, const float* scale) {
    const bool tall = rows > columns;
    const auto work = [&](int64_t begin, int64_t end) {
        Orthogonal found(std::min(rows, columns), std::max(rows, columns));
        for (int64_t m = begin; m < end; m++) {
            const int64_t start = m * rows * columns;
            const int64_t down = tall ? 1 : columns, along = tall ? columns : 1;
            found({in + start, down, along}, {out + start, down, along}, steps, coefficients, least, follow, *scale);
        }
    };
#ifdef _OPENMP
    if (threads > 1 && count > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
        {
            const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
            const int64_t begin = me * count / team, end = (me + 1) * count / team;
            if (begin < end) work(begin, end);
        }
        return;
    }
#endif
    work(0, count);
}
