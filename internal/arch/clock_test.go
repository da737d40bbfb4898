package arch

import (
	"go/ast"
	"slices"
	"testing"
)

// wallClock are the methods of time.Time, and the functions of package time, that go by
// the wall clock, which may jump by hours: what they return has no monotonic reading, or
// compares without it.
var wallClock = []string{
	"Unix", "UnixNano", "UnixMilli", "UnixMicro", "UTC", "Local", "AppendFormat", "MarshalJSON", "MarshalBinary",
	"AddDate", "Date", "Clock", "Hour", "Minute", "Second", "YearDay", "Weekday",
}

// TestNothingIsDecidedByTheWallClock: time since a moment, deadlines, pauses and ages of
// the product's packages go by the monotonic clock, which time.Now has with it. The
// readings of the wall clock are the timestamp that a message gets for its receiver, the
// expiry of a message that is stored, which outlives the process, and the time at which
// a stream was made, which is a part of its name. The message of a broadcast job is stamped with the job's beginning.
func TestNothingIsDecidedByTheWallClock(t *testing.T) {
	allowed := []string{"transport/ingress/decode.go", "transport/store/jetstream/message.go", "transport/store/jetstream/logs.go", "transport/jobs/run.go"}
	found := map[string]int{}
	for _, src := range sources(t) {
		if src.test() || src.generated() || !slices.ContainsFunc([]string{"engine", "shard", "transport", "internal/health", "internal/telemetry", "internal/app/pushmanager"},
			func(top string) bool { return within(top, src.dir) }) {
			continue
		}
		for node := range ast.Preorder(src.file) {
			if name := wallClockCall(node); name != "" {
				found[src.path()]++
				if !slices.Contains(allowed, src.path()) {
					t.Errorf("%s: %s goes by the wall clock", src.path(), name)
				}
			}
		}
	}
	if found[allowed[0]] != 1 {
		t.Errorf("%s reads the wall clock %d times, and stamps messages once", allowed[0], found[allowed[0]])
	}
}

// wallClockCall is the name of a function called by node that goes by the wall clock.
func wallClockCall(node ast.Node) string {
	call, ok := node.(*ast.CallExpr)
	if !ok {
		return ""
	}
	fun, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return ""
	}
	if slices.Contains(wallClock, fun.Sel.Name) {
		return fun.Sel.Name
	}
	// Round(0) exists to drop the monotonic reading.
	if zero, ok := first(call.Args).(*ast.BasicLit); ok && fun.Sel.Name == "Round" && zero.Value == "0" {
		return "Round(0)"
	}
	return ""
}

func first(list []ast.Expr) ast.Expr {
	if len(list) == 0 {
		return nil
	}
	return list[0]
}
