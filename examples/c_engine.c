/* An int8 engine for small CNNs: uint8 activations, int8 weights, NCHW, one image at a time.
 *
 * parameters.h is what fxqfix.export.c_header wrote, net.h is the list of layers that c_engine.py
 * wrote from the same parameters. Requantization is qnnpack's: sums as int32, the bias in them, a
 * float32 multiplier, halves to even. Each MISTAKE_... is what a first version often gets wrong.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "parameters.h"

typedef struct {
    int channels, height, width;
    uint8_t *codes;
} image_t;

typedef struct {
    const int8_t *weight;
    const int32_t *bias;
    const float *multiplier;
    int per_channel; /* one multiplier per output channel, or one for all */
    int outputs, inputs, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, groups;
    int input_zero_point, zero_point, low, high;
} layer_t;

static void *take(size_t size) {
    void *found = calloc(size ? size : 1, 1);
    if (found == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return found;
}

static image_t image(int channels, int height, int width) {
    image_t made = {channels, height, width, NULL};
    made.codes = take((size_t)channels * (size_t)height * (size_t)width);
    return made;
}

static int32_t clamp(int64_t value, int low, int high) {
    return value < low ? low : value > high ? high : (int32_t)value;
}

static uint8_t requantize(const layer_t *layer, int channel, int32_t sum) {
    float scaled = (float)sum * layer->multiplier[layer->per_channel ? channel : 0];
#ifdef MISTAKE_TRUNCATION
    int64_t whole = (int64_t)scaled;
#else
    int64_t whole = (int64_t)nearbyintf(scaled);
#endif
    return (uint8_t)clamp(whole + layer->zero_point, layer->low, layer->high);
}

static image_t quantize(const float *values, int channels, int height, int width, float scale,
                        int zero_point) {
    image_t out = image(channels, height, width);
    float inverse = 1.0f / scale;
    for (int i = 0; i < channels * height * width; i++) {
#ifdef POINT_FIRST
        float whole = nearbyintf(fmaf(values[i], inverse, (float)zero_point));
#else
        float whole = nearbyintf(values[i] * inverse) + (float)zero_point;
#endif
        out.codes[i] = (uint8_t)clamp((int64_t)whole, 0, 255);
    }
    return out;
}

/* The code of one input position; the zero point where the window leaves the image. */
static int code_at(const image_t *in, int channel, int y, int x, int zero_point) {
    if (y < 0 || x < 0 || y >= in->height || x >= in->width) {
#ifdef MISTAKE_PADDING
        zero_point = 0;
#endif
        return zero_point;
    }
    return in->codes[(channel * in->height + y) * in->width + x];
}

static int32_t window(const layer_t *l, const image_t *in, int output, int oy, int ox) {
    int group = output / (l->outputs / l->groups);
    int32_t sum = 0;
    for (int c = 0; c < l->inputs; c++) {
        for (int ky = 0; ky < l->kernel_h; ky++) {
            for (int kx = 0; kx < l->kernel_w; kx++) {
                int y = oy * l->stride_h + ky - l->pad_h, x = ox * l->stride_w + kx - l->pad_w;
                int code = code_at(in, group * l->inputs + c, y, x, l->input_zero_point);
                int at = ((output * l->inputs + c) * l->kernel_h + ky) * l->kernel_w + kx;
                sum += (code - l->input_zero_point) * l->weight[at];
            }
        }
    }
    return sum;
}

static image_t conv2d(const layer_t *l, const image_t *in) {
    int height = (in->height + 2 * l->pad_h - l->kernel_h) / l->stride_h + 1;
    int width = (in->width + 2 * l->pad_w - l->kernel_w) / l->stride_w + 1;
    image_t out = image(l->outputs, height, width);
    for (int o = 0; o < l->outputs; o++) {
        for (int y = 0; y < height; y++) {
            for (int x = 0; x < width; x++) {
                int32_t sum = window(l, in, o, y, x) + l->bias[o];
                out.codes[(o * height + y) * width + x] = requantize(l, o, sum);
            }
        }
    }
    return out;
}

static image_t linear(const layer_t *l, const image_t *in) {
    image_t out = image(l->outputs, 1, 1);
    for (int o = 0; o < l->outputs; o++) {
        int32_t sum = l->bias[o];
        for (int c = 0; c < l->inputs; c++) {
#ifdef MISTAKE_ZERO_POINT
            sum += in->codes[c] * l->weight[o * l->inputs + c];
#else
            sum += (in->codes[c] - l->input_zero_point) * l->weight[o * l->inputs + c];
#endif
        }
        out.codes[o] = requantize(l, o, sum);
    }
    return out;
}

static image_t max_pool2d(const image_t *in, int kernel_h, int kernel_w, int stride_h,
                          int stride_w) {
    int height = (in->height - kernel_h) / stride_h + 1;
    int width = (in->width - kernel_w) / stride_w + 1;
    image_t out = image(in->channels, height, width);
    for (int c = 0; c < in->channels; c++) {
        for (int y = 0; y < height; y++) {
            for (int x = 0; x < width; x++) {
                uint8_t most = 0;
                for (int k = 0; k < kernel_h * kernel_w; k++) {
                    int at_y = y * stride_h + k / kernel_w, at_x = x * stride_w + k % kernel_w;
                    uint8_t code = in->codes[(c * in->height + at_y) * in->width + at_x];
                    most = code > most ? code : most;
                }
                out.codes[(c * height + y) * width + x] = most;
            }
        }
    }
    return out;
}

static image_t flatten(const image_t *in) {
    image_t out = image(in->channels * in->height * in->width, 1, 1);
    memcpy(out.codes, in->codes, (size_t)out.channels);
    return out;
}

static void append(const char *folder, const char *name, const void *data, size_t size) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s.bin", folder, name);
    FILE *file = fopen(path, "ab");
    if (file == NULL || fwrite(data, 1, size, file) != size || fclose(file) != 0) {
        fprintf(stderr, "can't write %s\n", path);
        exit(1);
    }
}

/* Append one op's codes to FOLDER/NAME.bin: a dump for `fxqfix judge`. */
static void dump(const char *folder, const char *name, const image_t *value) {
    size_t size = (size_t)value->channels * (size_t)value->height * (size_t)value->width;
    append(folder, name, value->codes, size);
}

static void dequantize(const char *folder, const char *name, const image_t *in, float scale,
                       int zero_point) {
    for (int c = 0; c < in->channels; c++) {
        float value = (float)(in->codes[c] - zero_point) * scale;
        append(folder, name, &value, sizeof value);
    }
}

#include "net.h" /* run(values, folder): the layers in order */

/* engine INPUT COUNT FOLDER: COUNT images of float32, one after the other. */
int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: engine INPUT COUNT FOLDER\n");
        return 2;
    }
    FILE *file = fopen(argv[1], "rb");
    float *values = take(NET_INPUTS * sizeof(float));
    for (int i = 0; file != NULL && i < atoi(argv[2]); i++) {
        if (fread(values, sizeof(float), NET_INPUTS, file) != NET_INPUTS) {
            fprintf(stderr, "the input is cut short\n");
            return 1;
        }
        run(values, argv[3]);
    }
    free(values);
    return file == NULL || fclose(file) != 0;
}
