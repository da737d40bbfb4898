package web_test

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

const jobService = "/pubsub.BroadcastJobService/"

// A whole Push-Manager runs a job that came as JSON, to the clients of a real gateway.
func TestABroadcastJobOverHTTPReachesEverybody(t *testing.T) {
	w := newWorld(t)
	resp, body := post(t, clients["HTTP/1.1"], w.url+jobService+"CreateJob", `{"job_id":"http","spec":{"everybody":true,"content":{"data":"SGVsbG8="},"rate_per_second":100}}`, "Content-Type", "application/json")
	if resp.StatusCode != http.StatusOK || !strings.Contains(body, `"jobId":"http"`) {
		t.Fatalf("%d %s", resp.StatusCode, body)
	}
	for deadline := time.Now().Add(30 * time.Second); !strings.Contains(body, `"SUCCEEDED"`); time.Sleep(20 * time.Millisecond) {
		if _, body = post(t, clients["HTTP/1.1"], w.url+jobService+"GetJob", `{"job_id":"http"}`, "Content-Type", "application/json"); time.Now().After(deadline) {
			t.Fatal(body)
		}
	}
	if !strings.Contains(strings.ReplaceAll(body, " ", ""), `"targets":"2","delivered":"2"`) { // protojson has spaces in some builds
		t.Error(body)
	}
	for request, want := range map[string]string{
		`CreateJob {"job_id":"http","spec":{"everybody":true,"content":{},"rate_per_second":1}}`: "JOB_EXISTS",
		`CreateJob {"job_id":"x","spec":{"evrybody":true}}`:                                      "evrybody",
		`CreateJob {"job_id":"x","spec":{"everybody":true,"content":{}}}`:                        "spec.rate_per_second",
		`PauseJob {"job_id":"http"}`:                                                             "JOB_ENDED",
		`GetJob {"job_id":"none"}`:                                                               "JOB_NOT_FOUND",
		`ListJobs {"page_size":-1}`:                                                              "page_size",
	} {
		method, text, _ := strings.Cut(request, " ")
		if resp, body := post(t, clients["HTTP/1.1"], w.url+jobService+method, text, "Content-Type", "application/json"); resp.StatusCode < 400 || resp.StatusCode == http.StatusInternalServerError || !strings.Contains(body, want) {
			t.Errorf("%s: %d %s", request, resp.StatusCode, body)
		}
	}
	if _, body := post(t, clients["HTTP/2"], w.url+jobService+"ListJobs", `{}`, "Content-Type", "application/json"); strings.Count(body, `"jobId"`) != 1 || strings.Contains(body, `"spec"`) {
		t.Error(body)
	}
}
