// Labels texts with a bundle whose graph contains the tokenizer. Usage:
//   classify MODEL.onnx LIBRARY < TEXTS
// LIBRARY is the library of onnxruntime-extensions. TEXTS has one text in each line.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

// Returns the strings of a JSON list of labels. JSON has other escapes only for control characters.
std::vector<std::string> parse_labels(const std::string& json) {
    std::vector<std::string> labels;
    bool inside = false;
    for (std::size_t i = 0; i < json.size(); i++) {
        if (json[i] == '"') {
            inside = !inside;
            if (inside) labels.emplace_back();
        } else if (inside) {
            if (json[i] == '\\' && json[++i] != '"' && json[i] != '\\')
                throw std::runtime_error("a label has a control character");
            labels.back() += json[i];
        }
    }
    return labels;
}

Ort::SessionOptions session_options(const char* library) {
    Ort::SessionOptions options;
    options.RegisterCustomOpsLibrary(library);
    // For x86 without VNNI; with VNNI, an int8 model is exact and faster without this option.
    options.AddConfigEntry("session.x64quantprecision", "1");
    return options;
}

class Classifier {
   public:
    Classifier(const char* model, const char* library) : session_(environment_, model, session_options(library)) {
        auto labels = session_.GetModelMetadata().LookupCustomMetadataMapAllocated("toolchain.labels", allocator_);
        if (!labels) throw std::runtime_error("the model has no labels in its metadata");
        labels_ = parse_labels(labels.get());
    }

    // Returns the label with the highest probability, and this probability.
    std::pair<std::string, float> operator()(const std::string& text) {
        const std::int64_t shape = 1;
        const char* const texts[] = {text.c_str()};
        auto input = Ort::Value::CreateTensor(allocator_, &shape, 1, ONNX_TENSOR_ELEMENT_DATA_TYPE_STRING);
        input.FillStringTensor(texts, 1);
        const char* const input_name = "text";
        const char* const output_name = "probabilities";
        auto outputs = session_.Run(Ort::RunOptions{nullptr}, &input_name, &input, 1, &output_name, 1);
        if (outputs[0].GetTensorTypeAndShapeInfo().GetElementCount() != labels_.size())
            throw std::runtime_error("the model does not give each text one of its labels");
        const float* probabilities = outputs[0].GetTensorData<float>();
        const float* best = std::max_element(probabilities, probabilities + labels_.size());
        return {labels_[static_cast<std::size_t>(best - probabilities)], *best};
    }

   private:
    Ort::Env environment_{ORT_LOGGING_LEVEL_WARNING, "classify"};
    Ort::AllocatorWithDefaultOptions allocator_;
    Ort::Session session_;
    std::vector<std::string> labels_;
};

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) {
        std::cerr << "usage: classify MODEL.onnx LIBRARY < TEXTS\n";
        return 2;
    }
    try {
        Classifier classify(arguments[1], arguments[2]);
        for (std::string text; std::getline(std::cin, text);) {
            const auto [label, probability] = classify(text);
            std::cout << label << '\t' << probability << '\t' << text << std::endl;
        }
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
    return 0;
}
