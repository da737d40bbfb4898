package acceptance

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

// connectWeb is a page with @connectrpc/connect-web as it comes from npm. The services are made of their descriptors, so that none of the
// code is ours. call(address, way, method, request) is what became of a call, as JSON.
const connectWeb = `<!doctype html><title>connect-web</title>
<script type="importmap">{"imports": {
  "@connectrpc/connect": "/modules/@connectrpc/connect/dist/esm/index.js",
  "@connectrpc/connect/protocol": "/modules/@connectrpc/connect/dist/esm/protocol/index.js",
  "@connectrpc/connect/protocol-connect": "/modules/@connectrpc/connect/dist/esm/protocol-connect/index.js",
  "@connectrpc/connect/protocol-grpc-web": "/modules/@connectrpc/connect/dist/esm/protocol-grpc-web/index.js",
  "@connectrpc/connect-web": "/modules/@connectrpc/connect-web/dist/esm/index.js",
  "@bufbuild/protobuf": "/modules/@bufbuild/protobuf/dist/esm/index.js",
  "@bufbuild/protobuf/codegenv2": "/modules/@bufbuild/protobuf/dist/esm/codegenv2/index.js",
  "@bufbuild/protobuf/reflect": "/modules/@bufbuild/protobuf/dist/esm/reflect/index.js",
  "@bufbuild/protobuf/wire": "/modules/@bufbuild/protobuf/dist/esm/wire/index.js",
  "@bufbuild/protobuf/wkt": "/modules/@bufbuild/protobuf/dist/esm/wkt/index.js"
}}</script>
<script type="module">
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createConnectTransport, createGrpcWebTransport } from "@connectrpc/connect-web";
import { createFileRegistry, fromBinary } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";

const ways = {
  "Connect with JSON": baseUrl => createConnectTransport({ baseUrl }),
  "Connect": baseUrl => createConnectTransport({ baseUrl, useBinaryFormat: true }),
  "gRPC-Web": baseUrl => createGrpcWebTransport({ baseUrl }),
};
const files = new Uint8Array(await (await fetch("/files.bin")).arrayBuffer());
const registry = createFileRegistry(fromBinary(FileDescriptorSetSchema, files));
globalThis.call = async (address, way, method, request) => {
  const client = createClient(registry.getService("pubsub.PushManagerService"), ways[way](address));
  try {
    if (method === "pushStream") {
      const one = async function* () { yield { id: 1n, push: { case: "toUser", value: request } }; };
      for await (const reply of client.pushStream(one())) return JSON.stringify({ delivered: reply.result.value?.summary?.delivered });
      return "{}";
    }
    const reply = await client[method](request);
    return JSON.stringify({ success: reply.success, delivered: reply.summary?.delivered });
  } catch (thrown) {
    const e = ConnectError.from(thrown);
    return JSON.stringify({ code: Code[e.code], reasons: e.findDetails(registry.getMessage("google.rpc.ErrorInfo")).map(d => d.reason) });
  }
};
globalThis.content = text => ({ data: new TextEncoder().encode(text) });
document.title = "ready";
</script>`

// sawWeb is what a call of that page became.
type sawWeb struct {
	Success   bool
	Delivered int
	Code      string
	Reasons   []string
}

// TestConnectWebInABrowser: a page of an origin that is allowed pushes over each of the protocols and reads what is wrong, a PushStream
// is refused, and a page of another origin pushes nothing.
func TestConnectWebInABrowser(t *testing.T) {
	if _, err := os.Stat("nodejs/node_modules/@connectrpc/connect-web"); err != nil {
		missing(t, "there is no connect-web (make interop-tools)")
	}
	set := &descriptorpb.FileDescriptorSet{}
	var add func(protoreflect.FileDescriptor)
	add = func(file protoreflect.FileDescriptor) {
		for i := range file.Imports().Len() {
			add(file.Imports().Get(i).FileDescriptor)
		}
		if !slices.ContainsFunc(set.GetFile(), func(has *descriptorpb.FileDescriptorProto) bool { return has.GetName() == file.Path() }) {
			set.File = append(set.File, protodesc.ToFileDescriptorProto(file))
		}
	}
	add(pubsub.File_push_manager_proto)
	add(errdetails.File_google_rpc_error_details_proto)
	files, err := proto.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	pages := http.NewServeMux()
	pages.Handle("GET /modules/", http.StripPrefix("/modules/", http.FileServer(http.Dir("nodejs/node_modules"))))
	pages.HandleFunc("GET /files.bin", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(files) })
	pages.HandleFunc("GET /page", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = w.Write([]byte(connectWeb))
	})
	ours, foreign := httptest.NewServer(pages), httptest.NewServer(pages)
	t.Cleanup(ours.Close)
	t.Cleanup(foreign.Close)

	s := startSecured(t)
	port := freeport.Take(t, 1)[0]
	s.launchPlain(t, "HTTP_PORT="+port, "HTTP_ALLOWED_ORIGINS="+ours.URL)
	call := func(page *tab, way, method, request string) (saw sawWeb) {
		t.Helper()
		text := page.eval(fmt.Sprintf("call('http://127.0.0.1:%s', '%s', '%s', %s)", port, way, method, request))
		if err := json.Unmarshal([]byte(text), &saw); err != nil {
			t.Fatalf("%s %s: %q", way, method, text)
		}
		return saw
	}
	page := browse(t, ours.URL+"/page", "")
	page.shows("document.title", "ready")
	var want []string
	for _, way := range []string{"Connect with JSON", "Connect", "gRPC-Web"} {
		if saw := call(page, way, "pushToUser", `{userId: "alice", content: content("`+way+`")}`); !saw.Success || saw.Delivered != 1 {
			t.Errorf("%s: %+v", way, saw)
		}
		want = append(want, way)
		if saw := call(page, way, "pushToUser", `{userId: "", content: content("x")}`); saw.Code != "InvalidArgument" || !slices.Equal(saw.Reasons, []string{"REQUIRED"}) {
			t.Errorf("%s, without a user_id: %+v", way, saw)
		}
		if saw := call(page, way, "pushStream", `{userId: "alice", content: content("x")}`); saw.Code == "" {
			t.Errorf("%s, a PushStream: %+v", way, saw)
		}
	}
	// The library does not even try a PushStream. This is what it would be told.
	if status := page.eval(`fetch("http://127.0.0.1:` + port + `/pubsub.PushManagerService/PushStream", { method: "POST", headers: { "Content-Type": "application/connect+json" }, body: "" }).then(r => String(r.status))`); status != "505" {
		t.Errorf("a PushStream of a browser is answered with %q", status)
	}
	stranger := browse(t, foreign.URL+"/page", "")
	stranger.shows("document.title", "ready")
	for _, way := range []string{"Connect with JSON", "Connect", "gRPC-Web"} {
		if saw := call(stranger, way, "pushToUser", `{userId: "alice", content: content("foreign")}`); saw.Success || saw.Code == "" || len(saw.Reasons) > 0 {
			t.Errorf("%s from a foreign origin: %+v", way, saw)
		}
	}
	if got := s.users.of("alice"); !slices.Equal(got, want) {
		t.Errorf("alice got %q, want %q", got, want)
	}
}

// TestTheOpenAPIDocumentIsValid in the eyes of a validator that is not ours; a document with one mistake is not.
func TestTheOpenAPIDocumentIsValid(t *testing.T) {
	node := tool(t, "node", "Node.js 20 or later")
	if _, err := os.Stat("nodejs/node_modules/@seriousme/openapi-schema-validator"); err != nil {
		missing(t, "there is no validator of OpenAPI (make interop-tools)")
	}
	const file = "../../docs/openapi.yaml"
	out, errOut, err := run(t, "", node, "nodejs/openapi.mjs", file)
	if err != nil || strings.TrimSpace(out) != "3.1" {
		t.Errorf("%v: %s%s", err, out, errOut)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, mistake := range [][2]string{{"responses:", "response:"}, {"#/components/schemas/", "#/components/schemata/"}} {
		wrong := filepath.Join(t.TempDir(), "wrong.yaml")
		if err := os.WriteFile(wrong, []byte(strings.Replace(string(text), mistake[0], mistake[1], 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, _, err := run(t, "", node, "nodejs/openapi.mjs", wrong); err == nil {
			t.Errorf("%s for %s is valid: %s", mistake[1], mistake[0], out)
		}
	}
}

// TestBufCurlPushes over each of its protocols, with the descriptors that the server tells, as docs/http.md says.
func TestBufCurlPushes(t *testing.T) {
	buf := tool(t, "buf", "make interop-tools builds it")
	s := startSecured(t)
	ports := freeport.Take(t, 2)
	plain := s.launchPlain(t, "HTTP_PORT="+ports[0])
	s.launch(t, "HTTP_PORT="+ports[1], "MANAGER_ID=tls")
	const method = "/pubsub.PushManagerService/PushToUser"
	var want []string
	for _, c := range []struct {
		name string
		args []string
	}{
		{"Connect", []string{"--http2-prior-knowledge", "http://127.0.0.1:" + ports[0] + method}},
		{"gRPC", []string{"--http2-prior-knowledge", "--protocol=grpc", "http://127.0.0.1:" + ports[0] + method}},
		{"gRPC on its own port", []string{"--http2-prior-knowledge", "--protocol=grpc", "http://" + plain.api + method}},
		{"gRPC-Web", []string{"--http2-prior-knowledge", "--protocol=grpcweb", "http://127.0.0.1:" + ports[0] + method}},
		{"TLS", []string{"--cacert", s.file("ca.crt"), "--cert", s.file("client-billing.crt"), "--key", s.file("client-billing.key"), "https://localhost:" + ports[1] + method}},
	} {
		data := func(user string) []string {
			return append([]string{"curl", "-d", `{"user_id": "` + user + `", "content": {"metadata": {"k": "v"}, "data": "SGVsbG8="}}`}, c.args...)
		}
		if out, errOut, err := run(t, "", buf, data("alice")...); err != nil || !strings.Contains(out, `"success": true`) {
			t.Errorf("%s: %v\n%s%s", c.name, err, out, errOut)
		}
		want = append(want, "Hello")
		if _, errOut, err := run(t, "", buf, data("")...); err == nil || !strings.Contains(errOut, `"invalid_argument"`) || !strings.Contains(errOut, "user_id: must not be empty") || !strings.Contains(errOut, "google.rpc.ErrorInfo") {
			t.Errorf("%s, without a user_id: %v\n%s", c.name, err, errOut)
		}
	}
	if got := s.users.of("alice"); !slices.Equal(got, want) {
		t.Errorf("alice got %q", got)
	}
}
